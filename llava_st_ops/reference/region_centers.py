"""The centre of each region of a grid, by linear interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _block_centers(x: Tensor, dim: int, step: int) -> Tensor:
    """The centre of each block of `step` samples along `dim`; the last block may be smaller."""
    size = x.shape[dim]
    if _is_unknown(size):
        return _block_centers_of_any_size(x, dim, step)
    step = max(1, min(step, size))
    full = size // step
    whole, rest = x.narrow(dim, 0, full * step), x.narrow(dim, full * step, size - full * step)
    parts = []
    for part, samples in ((whole, step), (rest, size - full * step)):
        if part.shape[dim]:
            blocks = part.unflatten(dim, (-1, samples))
            low, high = blocks.select(dim + 1, (samples - 1) // 2), blocks.select(dim + 1, samples // 2)
            parts.append(low if samples % 2 else (low + high) / 2)
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0] if parts else x


def _is_unknown(size: int) -> bool:
    """Whether a size is a variable of a program that is being exported, so that nothing may be decided by it."""
    return torch.compiler.is_exporting() and isinstance(size, torch.SymInt)


def _block_centers_of_any_size(x: Tensor, dim: int, step: int) -> Tensor:
    """The same by index, the middle two samples of a block being one where it has an odd number."""
    size = x.shape[dim]
    begin = torch.arange(-(-size // step), device=x.device) * step
    ends = begin + (begin + step).clamp(max=size)
    return (x.index_select(dim, (ends - 1) // 2) + x.index_select(dim, ends // 2)) / 2


def region_centers(x: Tensor, region: Sequence[int]) -> Tensor:
    """`[B, T, H, W, C]` -> `[B, T', H', W', C]`: the middle sample of each region, or the mean of the middle two
    per axis where a size is even.

    Where the region divides the grid this is `torch.nn.functional.interpolate(..., align_corners=False)`. A partial
    region at the edge has its own centre by the same rule. Means are taken in float32 or better and rounded once.
    """
    sizes = x.shape[1:4]
    if not any(map(_is_unknown, sizes)) and all(s % 2 == 1 and n % s == 0 for s, n in zip(region, sizes, strict=True)):
        low_precision = False  # no mean is taken
    else:
        low_precision = x.dtype in (torch.float16, torch.bfloat16)
    centers = x.float() if low_precision else x
    for dim, step in enumerate(region, start=1):
        centers = _block_centers(centers, dim, step)
    return centers.to(x.dtype)
