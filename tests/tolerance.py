"""How results are compared: a kernel may err at most twice as much as the same-dtype reference, plus one rounding.

One rounding is that of the result in its own dtype, and one in float32, in which kernels compute, of a value as large
as the inputs (about 1): without it a test on a handful of entries, in which the reference happens to be exact, fails by
chance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def assert_accurate(
    actual: Tensor, exact: Tensor, same_dtype: Tensor, name: str = "result", besides: float = 0.0
) -> None:
    """`actual` against `exact` (float64), allowed twice the largest error of `same_dtype`, plus one rounding step, plus
    what a test allows besides.

    In float64 itself `exact` is no better than `actual`: there the bound is 1e-12 of the largest entry.
    NaN and infinities must be where `same_dtype` has them.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    for kind, find in (("NaN", torch.isnan), ("Inf", torch.isinf)):
        differ = find(actual) != find(same_dtype)
        if differ.any():
            at = _first(differ)
            found, wanted = actual[at].item(), same_dtype[at].item()
            raise AssertionError(f"{name}: {kind} differs at {at}: {found}, the reference has {wanted}")
    finite = torch.isfinite(same_dtype) & torch.isfinite(exact)
    if not finite.any():
        return
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    error = torch.where(finite, (actual.double() - exact).abs(), zero)
    reference_error = torch.where(finite, (same_dtype.double() - exact).abs(), zero).max()
    magnitude = torch.where(finite, exact.abs(), zero)
    if actual.dtype == torch.float64:
        bound = torch.full_like(error, 1e-12 * max(1.0, magnitude.max().item()) + besides)
    else:
        computing = torch.finfo(torch.float32).eps * max(1.0, magnitude.max().item())
        bound = 2 * reference_error + besides + computing + torch.finfo(actual.dtype).eps * magnitude
    wrong = error > bound
    if wrong.any():
        at = _first(wrong)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries are off; the first, at {at}, is "
            f"{actual[at].item()} instead of {exact[at].item()} (error {error[at].item():.3g}, allowed "
            f"{bound[at].item():.3g}); the largest error is {error.max().item():.3g}"
        )
