"""What the tests of lape_add, lape_scatter and the coordinate loss share: inputs, and comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from llava_st_ops import backends
from tests.tolerance import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AXES = ("temporal", "height", "width")
NAN = float("nan")


def skip_without_kernel(op: str, device: torch.device, dtype: torch.dtype) -> None:
    verdict = backends.can_run(backends.forced_backend(), op, device, dtype)
    if not verdict.ok:
        pytest.skip(verdict.reason)


def namespace() -> str:
    """Of the ops of the backend in force; the reference has none."""
    found = backends.find_backend(backends.forced_backend()).namespace
    if found is None:
        pytest.skip("the reference is no op")
    return found


def random(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def results(function: Callable, inputs: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output of `function(*inputs)`, and the gradients of all inputs where `grad` is one of the output."""
    if grad is None:
        return [function(*inputs).detach()]
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype).expand_as(output))]


def assert_matches(
    function: Callable, plain: Callable, inputs: Sequence[Tensor], names: Sequence[str], grad: Tensor | None
) -> None:
    """Output and gradients of `function(*inputs)` against `plain` in float64 and in the inputs' own dtypes."""
    actual = results(function, inputs, grad)
    exact = results(plain, [x.double() for x in inputs], grad)
    same = results(plain, inputs, grad)
    for name, *triple in zip(("output", *(f"gradient of {name}" for name in names)), actual, exact, same, strict=False):
        assert_accurate(*triple, name)
