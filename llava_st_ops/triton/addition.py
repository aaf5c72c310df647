"""Launches the Triton kernels of lape_add and its backward, dense and packed.

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. The launch depends on shapes, dtypes and strides alone, and nothing is read back from the device, so that calls
can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import launching
from .launching import next_power_of_2, normalized_strides, on_device_of, packed_layout

if TYPE_CHECKING:
    from .addition_kernels import Tables
    from .regions import Layout

# Forward: elements of a tile, 16 per thread, and frames per program.
_TILE = 2048
_TILE_CHANNELS = 512
_FRAMES = 8
# Backward: a warp holds a tile, so that sums over its patches need no other warp.
_SUM_PATCHES = 32
_SUM_CHANNELS = 32
# It adds up slices of the tokens on their own: enough of them for a GPU, none too short, in no more scratch than this.
_SUM_PROGRAMS = 2048
_SUM_SLICE = 256
_SUM_BYTES = 64 * 2**20
# An axis of a CUDA grid other than the first has at most this many blocks.
_MAX_ROWS = 65535
# From here on products of counts leave int32.
_WIDE_FROM = 2**31


def _blocks(patches: int, channels: int) -> tuple[int, int, int]:
    """Of the forward kernels: patches and channels per tile, and warps."""
    block_channels = min(next_power_of_2(channels), _TILE_CHANNELS)
    block_patches = min(next_power_of_2(patches), _TILE // block_channels)
    return block_patches, block_channels, max(1, block_patches * block_channels * 4 // _TILE)


def _spatial(text_aligned: bool) -> str:
    return "text" if text_aligned else "centers"


def _tables(temporal: Tensor, height: Tensor, width: Tensor) -> Tables:
    from .addition_kernels import Tables

    tables = (temporal, height, width)
    return Tables(*tables, *(normalized_strides(table, 2) for table in tables), tuple(map(len, tables)))


def _is_wide(sizes: tuple[int, ...], tables: tuple[Tensor, ...]) -> bool:
    """Whether places of patches must be computed in 64 bits."""
    return 2 * max(sizes) * max(map(len, tables)) >= _WIDE_FROM


def _add(
    features: Tensor,
    output: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    text_aligned: bool,
    round_every_addition: bool,
) -> None:
    from .addition_kernels import add_kernel

    if features.numel() == 0:
        return
    batch, *sizes, channels = features.shape
    patches, block_channels, warps = _blocks(sizes[2], channels)
    frames = batch * sizes[0]
    width_blocks, channel_blocks = -(-sizes[2] // patches), -(-channels // block_channels)
    with on_device_of(features):
        launching.launch(
            add_kernel,
            (-(-frames // _FRAMES) * sizes[1] * width_blocks * channel_blocks,),
            features,
            output,
            _tables(*tables),
            normalized_strides(features, 5),
            normalized_strides(output, 5),
            tuple(sizes),
            frames,
            channels,
            width_blocks,
            channel_blocks,
            SPATIAL=_spatial(text_aligned),
            ROUND_EVERY_ADDITION=round_every_addition,
            WIDE=_is_wide((frames + _FRAMES, *sizes), tables),
            FRAMES=_FRAMES,
            BLOCK_W=patches,
            BLOCK_C=block_channels,
            num_warps=warps,
        )


def lape_add(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """features `[B, T, H, W, C]`, tables `[n, C]`, `[m, C]`, `[m', C]` of one dtype -> like features."""
    output = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    _add(features, output, (temporal, height, width), text_aligned, round_every_addition)
    return output


def lape_add_(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> None:
    """`lape_add` in place. No two elements of features may share memory."""
    _add(features, features, (temporal, height, width), text_aligned, round_every_addition)


def lape_add_packed(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    grid_thw: Tensor,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """features `[tokens, C]`, tables `[n, C]`, `[m, C]`, `[m', C]`, grid_thw int `[videos, 3]` -> like features.

    A token past the last video stays as it is. A video past the last token is cut, but resizes the tables to all of it
    (to as many patches along an axis as there are tokens, where it claims more).
    """
    from .addition_kernels import add_packed_kernel

    output = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if output.numel() == 0:
        return output
    tokens, channels = features.shape
    block_tokens, block_channels, warps = _blocks(tokens, channels)
    channel_blocks = -(-channels // block_channels)
    tables = (temporal, height, width)
    with on_device_of(features):
        launching.launch(
            add_packed_kernel,
            (-(-tokens // block_tokens) * channel_blocks,),
            features,
            output,
            _tables(*tables),
            normalized_strides(features, 2),
            packed_layout(features, tokens, grid_thw, (1, 1, 1)),
            channels,
            channel_blocks,
            SPATIAL=_spatial(text_aligned),
            ROUND_EVERY_ADDITION=round_every_addition,
            WIDE=_is_wide((tokens + 1,), tables),
            BLOCK_TOKENS=block_tokens,
            BLOCK_C=block_channels,
            num_warps=warps,
        )
    return output


def _backward(
    grad_output: Tensor, tables: tuple[Tensor, Tensor, Tensor], layout: Layout, patches: int, text_aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`patches`: no row of the grids is longer, or so long that it matters."""
    from .addition_kernels import add_slices_kernel, sum_kernel

    gradients = tuple(torch.empty(table.shape, dtype=table.dtype, device=table.device) for table in tables)
    channels = grad_output.shape[-1]
    if channels == 0:
        return gradients
    counts = tuple(map(len, tables))
    block_patches = min(next_power_of_2(patches), _SUM_PATCHES)
    block_channels = min(next_power_of_2(channels), _SUM_CHANNELS)
    channel_blocks = -(-channels // block_channels)
    slice_rows = sum(counts) + block_patches
    slices = max(
        1,
        min(
            -(-layout.tokens // _SUM_SLICE),
            -(-_SUM_PROGRAMS // channel_blocks),
            _SUM_BYTES // (slice_rows * channels * 4),
        ),
    )
    sums = torch.empty((slices, slice_rows, channels), dtype=torch.float32, device=grad_output.device)
    launching.launch(
        sum_kernel,
        (channel_blocks, slices),
        grad_output,
        sums,
        normalized_strides(grad_output, 5),
        layout,
        counts,
        channels,
        -(-layout.tokens // slices),
        SPATIAL=_spatial(text_aligned),
        WIDE=_is_wide((layout.tokens + 1,), tables),
        BLOCK_W=block_patches,
        BLOCK_C=block_channels,
        num_warps=1,
    )
    block_channels = min(next_power_of_2(channels), _TILE_CHANNELS)
    rows = min(sum(counts), _MAX_ROWS)
    launching.launch(
        add_slices_kernel,
        (-(-channels // block_channels), rows, -(-sum(counts) // rows)),
        sums,
        *gradients,
        counts,
        channels,
        slices,
        slice_rows,
        BLOCK_C=block_channels,
        num_warps=4,
    )
    return gradients


def lape_add_backward(
    grad_output: Tensor, temporal: Tensor, height: Tensor, width: Tensor, text_aligned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three tables, of their shapes and dtype, from that of the output, which is read once.

    Sums are in fp32 and in an order that depends on nothing but shapes. Whether the forward pass rounded in between
    makes no difference.
    """
    from .regions import Layout

    batch, *sizes = grad_output.shape[:4]
    layout = Layout(
        queries=batch * math.prod(sizes),
        tokens=batch * math.prod(sizes),
        region=(1, 1, 1),
        grid=tuple(sizes),
        regions=tuple(sizes),
        videos=batch,
    )
    with on_device_of(grad_output):
        return _backward(grad_output, (temporal, height, width), layout, sizes[2], text_aligned)


def lape_add_packed_backward(
    grad_output: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    grid_thw: Tensor,
    text_aligned: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lape_add_backward`; grad_output `[tokens, C]`. A token past the last video adds nothing."""
    tables = (temporal, height, width)
    with on_device_of(grad_output):
        layout = packed_layout(grad_output, len(grad_output), grid_thw, (1, 1, 1))
        return _backward(grad_output, tables, layout, len(grad_output), text_aligned)
