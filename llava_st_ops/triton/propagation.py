"""The Triton kernel of propagate_to_neighbors, and its launch. Triton is imported by the first call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_CHANNELS = 128  # per program


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


def propagate_to_neighbors(x: Tensor) -> Tensor:
    """`[n, C] -> [n, C]`, contiguous; `x` may be strided in any way."""
    from .propagation_kernel import propagate_kernel

    rows, channels = x.shape
    y = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    before = torch.empty((rows, channels), dtype=torch.float32, device=x.device)
    grid = (-(-channels // _CHANNELS),)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _launch(propagate_kernel, grid, x, y, before, rows, channels, *x.stride(), BLOCK=_CHANNELS, num_warps=4)
    return y
