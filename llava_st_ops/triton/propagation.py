"""The Triton kernel of propagate_to_neighbors, and its launch. Triton is imported by the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launching

_CHANNELS = 128  # per program


def propagate_to_neighbors(x: Tensor) -> Tensor:
    """`[n, C] -> [n, C]`, contiguous; `x` may be strided in any way."""
    from .propagation_kernel import propagate_kernel

    rows, channels = x.shape
    y = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    before = torch.empty((rows, channels), dtype=torch.float32, device=x.device)
    grid = (-(-channels // _CHANNELS),)
    with launching.on_device_of(x):
        launching.launch(
            propagate_kernel, grid, x, y, before, rows, channels, *x.stride(), BLOCK=_CHANNELS, num_warps=4
        )
    return y
