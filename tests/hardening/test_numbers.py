"""Denormal numbers, infinities and NaN in every op, and torch's switches for determinism and precision."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import use_backend
from tests.hardening.op_calls import OPS, Call, example

BAD = (float("inf"), -float("inf"), float("nan"))
# Where these are not finite, whether it is an infinity or NaN may differ: an infinity times what is 0 here and next to
# nothing there (the tail of the GELU), or both in the same row of logits, whose loss is then infinite.
NOT_FINITE_IS_ALL = ("lape_mlp", "coordinate_cross_entropy")


def run(call: Call, function, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in call.sources.values()]
    output = call.of(function, leaves)
    grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_finite_is_so_where_the_reference_has_it(name, dtype):
    """In the result; gradients of what is not finite are whatever they are."""
    call = example(name, dtype)
    for source, x in call.sources.items():
        for bad in BAD:
            changed = x.contiguous().clone()
            changed.view(-1)[changed.numel() // 2] = bad
            damaged = Call(call.name, {**call.sources, source: changed}, call.run, call.plain, call.others)
            actual, same = (call.of(f, list(damaged.sources.values())) for f in (call.run, call.plain))
            kinds = (torch.isfinite,) if name in NOT_FINITE_IS_ALL else (torch.isnan, torch.isposinf, torch.isneginf)
            for kind in kinds:
                assert torch.equal(kind(actual), kind(same)), f"{source} with {bad}: {kind.__name__}"


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_denormal_numbers(name, flush):
    """All values are denormal: results are the reference's to a few of the smallest numbers there are."""
    call = example(name)
    tiny = {source: x * 1e-40 for source, x in call.sources.items()}
    assert any((x != 0).any() for x in tiny.values()), "denormal, and not zero"
    small = Call(call.name, tiny, call.run, call.plain, call.others)
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        actual, same = run(small, call.run), run(small, call.plain)
    finally:
        torch.set_flush_denormal(False)
    exact = run(small, call.plain, torch.float64)
    limits = torch.finfo(torch.float32)
    step = limits.tiny if flush else limits.smallest_normal * limits.eps  # between two numbers next to zero
    for source, a, b, c in zip(("output", *tiny), actual, exact, same, strict=True):
        bound = 100 * step + 2 * (c - b).abs().max() + 4 * limits.eps * b.abs().max()
        assert (a - b).abs().max() <= bound, source


@pytest.mark.parametrize("name", OPS)
def test_deterministic_algorithms_are_all_there_are(name):
    """Nothing has no deterministic implementation, and memory that torch fills with NaN is overwritten."""
    call = example(name)
    expected = run(call, call.run)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(call, call.run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Under autocast these stay in the dtype of their arguments, as an addition or a table does.
NOT_CAST = ("lape_add", "lape_add_packed", "lape_scatter", "propagation", "centers")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, backend):
    """Is the same as casting by hand, and gradients have the dtypes of the arguments."""
    call = example(name)
    leaves = [x.detach().requires_grad_() for x in call.sources.values()]
    with use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = call.of(call.run, leaves)
        cast = leaves if name in NOT_CAST else [x.detach().bfloat16() for x in leaves]
        if name == "lape_mlp":  # biases and positions stay, as in every layer
            kept = [k.startswith(("bias", "position")) for k in call.sources]
            cast = [x.detach() if keep else y for x, y, keep in zip(leaves, cast, kept, strict=True)]
        expected = call.of(call.run, cast)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    for grad in torch.autograd.grad(output.float().sum(), leaves, allow_unused=True):
        assert grad is None or grad.dtype == torch.float32
