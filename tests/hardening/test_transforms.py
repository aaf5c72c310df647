"""torch.func's transforms of every public op: the reference's result, or an error that says what is not supported."""

from __future__ import annotations

import re

import pytest
import torch

from tests.hardening.op_calls import OPS, example


def calls_of(name):
    """The op and its reference as functions of the first source, in float64; the source and a direction."""
    call = example(name, torch.float64)
    first, *others = call.sources.values()
    functions = [lambda x, f=f: call.of(f, [x, *others]) for f in (call.run, call.plain)]
    generator = torch.Generator().manual_seed(3)
    return *functions, first.contiguous(), torch.randn(first.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_right(name):
    run, plain, x, direction = calls_of(name)
    found, expected = (torch.func.jvp(f, (x,), (direction,)) for f in (run, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPS)
def test_gradients_by_transform_are_right(name):
    run, plain, x, _ = calls_of(name)
    found, expected = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (run, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPS)
def test_vmap_is_right_or_an_error(name):
    run, _, x, direction = calls_of(name)
    batch = torch.stack([x, direction, -x], dim=1)
    try:
        found = torch.vmap(run, in_dims=1)(batch)
    except (RuntimeError, NotImplementedError) as error:
        if not re.search("vmap|batching|functorch", str(error)):
            raise
        return
    torch.testing.assert_close(found, torch.stack([run(x), run(direction), run(-x)]), rtol=1e-12, atol=1e-12)
