"""Any call of a public op gives what its reference gives; one that makes no sense, a documented error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hardening.op_calls import NAN, OPS, Call, calls
from tests.hardening.profiles import fuzz
from tests.tolerance import assert_accurate


def results(call: Call, function, dtype: torch.dtype | None = None):
    """The output and the gradients of all sources, converted to a dtype first."""
    sources = [x if dtype is None else x.to(dtype) for x in call.sources.values()]
    leaves = [x.detach().requires_grad_() for x in sources]
    output = call.of(function, leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    narrow = next(iter(call.sources.values())).dtype
    if not output.requires_grad:  # of no videos at all the reference makes a constant
        return [output, *(torch.zeros_like(x) for x in leaves)]
    grads = torch.autograd.grad(output, leaves, grad.to(narrow).to(output.dtype), allow_unused=True)
    return [output.detach(), *(x.new_zeros(x.shape) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def effect_of_rounding(call: Call, exact: torch.Tensor) -> float:
    """How far the output moves where the sources are rounded in the dtype that is computed in.

    The order of a sum matters as much: of large scores, many times a rounding of the output. The reference's own order
    may escape that by chance, so that twice its error is no bound where there are few entries."""
    wide = torch.float64 if exact.dtype == next(iter(call.sources.values())).dtype else torch.float32
    step, generator = torch.finfo(wide).eps, torch.Generator().manual_seed(0)
    moved = 0.0
    for _ in range(2):
        signs = [torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1 for x in call.sources.values()]
        rounded = [x.double() * (1 + step * sign) for x, sign in zip(call.sources.values(), signs, strict=True)]
        difference = (call.of(call.plain, rounded) - exact).abs()
        moved = max(moved, torch.where(difference.isfinite(), difference, 0).max().item() if exact.numel() else 0.0)
    return moved


def assert_gradient(actual, exact, same, call: Call, label: str) -> None:
    """A gradient of a few entries may be a small difference of products of large sources, whose rounding the reference
    escapes by chance: besides twice its error, some steps of the largest product are allowed. In float64 the reference
    has no error, since it is what is compared with, and as many steps are allowed as there may be terms. A norm divides
    by `sqrt(eps)`, where a row's entries are alike."""
    sources = list(call.sources.values())
    assert actual.shape == exact.shape, label
    assert actual.dtype == same.dtype, label
    assert torch.equal(actual.isfinite(), same.isfinite()), label
    largest = (x.abs().nan_to_num(posinf=0).max().item() for x in sources if x.numel())  # a bias may be infinite
    product = math.prod(max(1.0, value) for value in largest) / math.sqrt(call.others.get("eps", 1.0))
    zero = exact.new_zeros(())
    finite = same.isfinite() & exact.isfinite()
    error, of_reference = (torch.where(finite, (x.double() - exact).abs(), zero) for x in (actual, same))
    if error.numel():
        steps = 4 + (max(x.numel() for x in sources) if sources[0].dtype == torch.float64 else 0)
        bound = 2 * of_reference.max().item() + steps * torch.finfo(sources[0].dtype).eps * product
        assert error.max().item() <= bound, f"{label}: error {error.max().item():.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("name", OPS)
def test_any_call_gives_what_the_reference_gives(name):
    @fuzz(25)
    @given(calls(name))
    def check(call):
        before = [x.clone() for x in call.sources.values()]
        actual, exact, same = (
            results(call, call.run),
            results(call, call.plain, torch.float64),
            results(call, call.plain),
        )
        assert_accurate(actual[0], exact[0], same[0], f"{name}: output", effect_of_rounding(call, exact[0]))
        for label, *triple in zip(call.sources, actual[1:], exact[1:], same[1:], strict=True):
            assert_gradient(*triple, call, f"{name}: {label}")
        for x, unchanged in zip(call.sources.values(), before, strict=True):
            assert torch.equal(x, unchanged), "arguments stay as they were"

    check()


def _largest(dtype: torch.dtype) -> float:
    """So large that products of two overflow; not larger, since sums of a few may come before a division. In float64 no
    product overflows: no wider dtype is there to say what it would have been."""
    if dtype.is_floating_point:
        return torch.finfo(dtype if dtype.itemsize < 8 else torch.float32).max / 1024
    return 1 if dtype == torch.bool else min(torch.iinfo(dtype).max, 2**31 - 1)


def wrong(x: torch.Tensor, how: str) -> object:
    """An argument in the place of a tensor."""
    return {
        "dtype": lambda: x.long() if x.dtype.is_floating_point else x.float(),
        "half": lambda: x.half(),
        "bool": lambda: x.bool(),
        "complex": lambda: x.to(torch.complex64),
        "fewer dimensions": lambda: x.flatten(),
        "more dimensions": lambda: x[None],
        "scalar": lambda: torch.zeros((), dtype=x.dtype),
        "longer": lambda: torch.cat([x, x[:1]]) if x.dim() and len(x) else x.new_zeros(3),
        "empty": lambda: x[:0] if x.dim() else x.new_zeros(0),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "negative": lambda: -x.abs() - 1 if x.dtype not in (torch.bool, torch.complex64) else x,
        "huge": lambda: torch.full_like(x, _largest(x.dtype)),
        "nan": lambda: x * NAN,
        "none": lambda: None,
        "number": lambda: 3,
        "list": lambda: [1, 2, 3],
        "text": lambda: "mean",
    }[how]()


HOW = ("dtype", "half", "bool", "complex", "fewer dimensions", "more dimensions", "scalar", "longer", "empty", "meta",
       "sparse", "negative", "huge", "nan", "none", "number", "list", "text")  # fmt: skip
NUMBERS = (None, -1, 0, 2**31, 2**63, 10**400, 0.5, NAN, float("inf"), "3", (1,), (0, 1, 1), (1, 1, 2**62), (1.5, 1, 1),
           ("1", 1, 1), [2**63] * 3, torch.ones(3), True)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_wrong_arguments_are_errors_or_are_understood(name):
    """Never a crash. What is taken gives a result that the reference gives, too; what is refused is a ValueError or a
    TypeError (an AttributeError where something is no tensor at all)."""

    @fuzz(60)
    @given(calls(name), st.data())
    def check(call, data):
        names = st.sampled_from([*call.sources, *call.others])
        errors: tuple[type[Exception], ...] = (ValueError, TypeError)
        for changed in data.draw(st.lists(names, min_size=1, max_size=2, unique=True)):
            arguments = call.sources if changed in call.sources else call.others
            value = arguments[changed]
            if isinstance(value, torch.Tensor):
                arguments[changed] = put = wrong(value, data.draw(st.sampled_from(HOW)))
                if not isinstance(put, torch.Tensor):
                    errors += (AttributeError,)
            else:
                arguments[changed] = data.draw(st.sampled_from(NUMBERS))
        try:
            output = call.of(call.run, list(call.sources.values()))
        except errors:
            return
        if output.is_meta:
            return
        expected = call.of(call.plain, [x if x is None else x.double() for x in call.sources.values()])
        same = call.of(call.plain, list(call.sources.values()))
        # Where the reference's numbers leave its dtype, those of a kernel may, and need not; what nothing finite is the
        # result of is infinite or NaN.
        left = same.isnan() & (~expected.isnan() | output.isinf()) | same.isinf() & expected.isfinite()
        exact = torch.where(left, expected.nan_to_num(), expected)
        output, same = (torch.where(left & ~x.isfinite(), exact.to(x.dtype), x) for x in (output, same))
        assert_accurate(output, exact, same, name)

    check()
