"""Errors against the reference in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llava_st_ops import reference

TENSORS = ("output", "grad_query", "grad_key", "grad_value")


def truth(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, region: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Output and gradients of the float64 reference.

    One slice of regions along time at a time: regions do not touch each other, and float64 copies of everything would
    take several GB.
    """
    step = region[0]
    slices: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
    for t in range(query.shape[1]):
        now, frames = slice(t, t + 1), slice(t * step, (t + 1) * step)
        parts = [x.detach().double().requires_grad_() for x in (query[:, now], key[:, frames], value[:, frames])]
        output = reference.point_to_region_attention(*parts, region)
        gradients = torch.autograd.grad(output, parts, grad_output[:, now].double())
        for name, result in zip(TENSORS, (output.detach(), *gradients), strict=True):
            slices[name].append(result)
    return {name: torch.cat(parts, 1) for name, parts in slices.items()}


def max_abs_error(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64. Raises where shapes differ or a value is not finite."""
    if result.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
    if result.numel() == 0:
        return 0.0
    part = 2**24  # of large results: float64 copies of everything would take several GB
    pairs = zip(result.detach().reshape(-1).split(part), expected.reshape(-1).split(part), strict=True)
    errors = torch.stack([(found.double() - right).abs().max() for found, right in pairs])
    if not errors.isfinite().all():
        raise ValueError("the result has values that are not finite")
    return errors.max().item()


def errors(results: Sequence[Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: max_abs_error(r, right) for r, (name, right) in zip(results, expected.items(), strict=True)}


def over_reference(found: Mapping[str, float], of_reference: Mapping[str, float]) -> float | None:
    """The largest ratio of an error to the same-dtype reference's; None where the reference is exact."""
    if any(of_reference[name] == 0 for name in found):
        return None
    return max(error / of_reference[name] for name, error in found.items())


def within_tolerance(
    found: Mapping[str, float], of_reference: Mapping[str, float], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> bool:
    """At most twice the same-dtype reference's error, plus one rounding step of the largest value."""
    rounding = torch.finfo(dtype).eps
    return all(
        error <= 2 * of_reference[name] + rounding * expected[name].abs().max().item() for name, error in found.items()
    )
