"""Launches the Triton kernels of point-to-region attention.

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. The launch depends on shapes, dtypes and strides alone: nothing is tuned, and nothing is read back from the
device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import launching
from .launching import dense_layout, next_power_of_2, normalized_strides, on_device_of, packed_layout

if TYPE_CHECKING:
    from .regions import Layout

# A warp reads 16 bytes per lane at once.
_WARP_BYTES = 32 * 16
# The most keys of which a lane holds its elements alone: 16 x 16 bytes of keys and of values, 64 registers each.
_KEYS_PER_LANE = 16
# Longer tiles are shared by lanes and warps, 64 elements per lane: with more the backward kernel spills registers.
_ELEMENTS_PER_WARP = 32 * 64
_MAX_WARPS = 4
_MAX_KEYS = 128
# A CUDA grid has at most this many blocks along its first axis, and 65,535 along the second.
_MAX_PROGRAMS = 2**31 - 1
# From this many tokens, queries or programs on, kernels count in 64 bits: below, no sum of two counts leaves int32.
_WIDE_FROM = 2**29


class _Blocks(NamedTuple):
    keys: int
    heads: int
    dim: int
    warps: int


def _blocks(keys: int, heads: int, dim: int, itemsize: int) -> _Blocks:
    """The tile of a program for regions of up to `keys` keys.

    Small regions: every warp takes as many heads as it reads at once, and waits for no other warp. For 16 bits, D 128
    and 3x3 or 5x1x1 keys that is two heads, in programs of two warps: fewer programs than with one, whose start would
    show in a kernel this short, and still enough of them on a multiprocessor to hide the latency of memory.
    Larger regions, such as 5x3x3: the warps share the keys of one head or a few.
    """
    block_dim = next_power_of_2(dim)
    block_keys = next_power_of_2(keys)
    block_heads = next_power_of_2(heads)
    row = block_dim * itemsize
    if block_keys <= _KEYS_PER_LANE and row <= _WARP_BYTES:
        block_heads = min(block_heads, 2 * _WARP_BYTES // row)
        return _Blocks(block_keys, block_heads, block_dim, max(1, block_heads * row // _WARP_BYTES))
    elements = _MAX_WARPS * _ELEMENTS_PER_WARP
    block_keys = min(block_keys, _MAX_KEYS, elements // block_dim)
    block_heads = min(block_heads, max(1, _WARP_BYTES // row), elements // (block_keys * block_dim))
    warps = max(1, block_keys * block_heads * block_dim // _ELEMENTS_PER_WARP)
    return _Blocks(block_keys, block_heads, block_dim, warps)


def _alignment(*strides: tuple[int, ...]) -> int:
    """The power of two, up to 16, that divides the offset of every row: Triton sees for itself only multiples of 16.

    It decides how wide loads are for sizes of D such as 40 and 72.
    """
    if any(last != 1 for *_, last in strides):
        return 1
    return math.gcd(16, *(stride for *rows, _ in strides for stride in rows))


def _launch_attention(
    kernel: Any,
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    key: Tensor,
    layout: Layout,
    scale: float | None,
) -> None:
    """Runs a kernel over all queries and heads. `tensors` are the inputs, `outputs` are contiguous."""
    heads, dim = key.shape[-2:]
    if layout.queries == 0 or heads == 0 or dim == 0:
        return
    keys = math.prod(layout.region)
    blocks = _blocks(keys, heads, dim, key.element_size())
    single_tile = keys <= blocks.keys
    tile = layout.region if single_tile else (0, 0, 0)
    head_blocks = -(-heads // blocks.heads)
    programs = layout.queries * head_blocks
    columns = -(-programs // _MAX_PROGRAMS)
    # (sample, T, H, W, head, D), of a packed tensor (0, 0, 0, row, head, D)
    strides = [normalized_strides(tensor, 6) for tensor in tensors]
    launching.launch(
        kernel,
        (-(-programs // columns), columns),
        *tensors,
        *outputs,
        *strides,
        layout,
        dim**-0.5 if scale is None else float(scale),
        heads,
        head_blocks,
        D=dim,
        TILE_T=tile[0],
        TILE_H=tile[1],
        TILE_W=tile[2],
        BLOCK_K=blocks.keys,
        BLOCK_HEADS=blocks.heads,
        BLOCK_D=blocks.dim,
        ALIGNMENT=_alignment(*strides),
        SINGLE_TILE=single_tile,
        WIDE=max(programs, layout.tokens) >= _WIDE_FROM,
        num_warps=blocks.warps,
    )


def forward(query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], scale: float | None) -> Tensor:
    """query `[B, T', H', W', heads, D]`, key and value `[B, T, H, W, heads, D]` -> `[B, T', H', W', heads, D]`."""
    from . import point_to_region_attention_kernels as kernels

    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    layout = dense_layout(query, key, region)
    with on_device_of(query):
        _launch_attention(kernels.forward_kernel, (query, key, value), (output,), key, layout, scale)
    return output


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, of their shapes, from that of the output."""
    from . import point_to_region_attention_kernels as kernels

    gradients = _empty_gradients(query, key, value)
    layout = dense_layout(query, key, region)
    with on_device_of(query):
        _launch_attention(kernels.backward_kernel, (grad_output, query, key, value), gradients, key, layout, scale)
    return gradients


def packed_forward(
    query: Tensor, key: Tensor, value: Tensor, grid_thw: Tensor, region: Sequence[int], scale: float | None
) -> Tensor:
    """query `[queries, heads, D]`, key and value `[tokens, heads, D]`, grid_thw int `[videos, 3]` -> like query.

    A query past the last video, or whose region lies past the last token, gives zeros.
    """
    from . import point_to_region_attention_kernels as kernels

    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    with on_device_of(query):
        layout = packed_layout(key, len(query), grid_thw, region)
        _launch_attention(kernels.forward_kernel, (query, key, value), (output,), key, layout, scale)
    return output


def packed_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, of their shapes; zeros for queries without keys, tokens without a query.

    Whether there are such tokens is known on the device alone. A launch that finds out there and zeroes just those
    costs microseconds; zeroing whole gradients first would write them twice.
    """
    from . import point_to_region_attention_kernels as kernels
    from .regions import zero_uncovered_kernel

    gradients = _empty_gradients(query, key, value)
    row_size = math.prod(key.shape[1:])
    if row_size == 0:
        return gradients
    with on_device_of(query):
        layout = packed_layout(key, len(query), grid_thw, region)
        _launch_attention(kernels.backward_kernel, (grad_output, query, key, value), gradients, key, layout, scale)
        if layout.tokens > 0:
            launching.launch(
                zero_uncovered_kernel,
                (min(-(-layout.tokens // 8), 256),),
                *gradients[1:],
                layout,
                row_size,
                BLOCK_ROWS=8,
                BLOCK_COLUMNS=min(256, next_power_of_2(row_size)),
            )
    return gradients


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
