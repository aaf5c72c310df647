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
    bias: Tensor | None,
    outputs: Sequence[Tensor | None],
    layout: Layout,
    scale: float | None,
) -> None:
    """Runs a kernel over all queries and heads. `tensors` are the inputs, key and value the last; `outputs` are
    contiguous."""
    *_, key, value = tensors
    (heads, dim), value_dim = key.shape[-2:], value.shape[-1]
    if layout.queries == 0 or heads == 0 or max(dim, value_dim) == 0:
        return
    keys = math.prod(layout.region)
    blocks = _blocks(keys, heads, max(dim, value_dim), key.element_size())
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
        bias if bias is None else bias.contiguous(),  # numbers that lie like those of tokens; next to keys they are few
        *outputs,
        *strides,
        layout,
        max(dim, 1) ** -0.5 if scale is None else float(scale),
        heads,
        head_blocks,
        D=dim,
        VALUE_D=value_dim,
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


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query `[B, T', H', W', heads, D]`, key `[B, T, H, W, heads, D]`, value `[B, T, H, W, heads, Dv]`, bias
    `[B, T, H, W, heads]` -> `[B, T', H', W', heads, Dv]`."""
    from . import point_to_region_attention_kernels as kernels

    output = _empty_output(query, value)
    layout = dense_layout(query, key, region)
    if output.numel() > 0:
        with on_device_of(query):
            _launch_attention(kernels.forward_kernel, (query, key, value), bias, (output,), layout, scale)
    return output


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and bias, of their shapes, from that of the output. That of no bias is
    empty."""
    from . import point_to_region_attention_kernels as kernels

    gradients, outputs = _empty_gradients(query, key, value, bias)
    layout = dense_layout(query, key, region)
    with on_device_of(query):
        _launch_attention(kernels.backward_kernel, (grad_output, query, key, value), bias, outputs, layout, scale)
    return gradients


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query `[queries, heads, D]`, key `[tokens, heads, D]`, value `[tokens, heads, Dv]`, grid_thw int `[videos, 3]`,
    bias `[tokens, heads]` -> `[queries, heads, Dv]`.

    A query past the last video, or whose region lies past the last token, gives zeros.
    """
    from . import point_to_region_attention_kernels as kernels

    output = _empty_output(query, value)
    if output.numel() == 0:
        return output
    with on_device_of(query):
        layout = packed_layout(key, len(query), grid_thw, region)
        _launch_attention(kernels.forward_kernel, (query, key, value), bias, (output,), layout, scale)
    return output


def packed_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and bias, of their shapes; zeros for queries without keys, tokens without a
    query. That of no bias is empty.

    Whether there are such tokens is known on the device alone. A launch that finds out there and zeroes just those
    costs microseconds; zeroing whole gradients first would write them twice.
    """
    from . import point_to_region_attention_kernels as kernels
    from .regions import zero_uncovered_kernel

    gradients, outputs = _empty_gradients(query, key, value, bias)
    row_sizes = [math.prod(gradient.shape[1:]) for gradient in gradients[1:]]
    if max(row_sizes[:2]) == 0:
        return gradients
    with on_device_of(query):
        layout = packed_layout(key, len(query), grid_thw, region)
        _launch_attention(kernels.backward_kernel, (grad_output, query, key, value), bias, outputs, layout, scale)
        if layout.tokens > 0:
            launching.launch(
                zero_uncovered_kernel,
                (min(-(-layout.tokens // 8), 256),),
                *outputs[1:],
                layout,
                *row_sizes,
                BLOCK_ROWS=8,
                BLOCK_COLUMNS=min(256, next_power_of_2(max(row_sizes))),
            )
    return gradients


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """The gradients, and what a kernel is to write of them."""
    shapes = (query.shape, key.shape, value.shape, (0,) if bias is None else bias.shape)
    of_query, of_key, of_value, of_bias = (torch.empty(s, dtype=query.dtype, device=query.device) for s in shapes)
    if max(query.shape[-1], value.shape[-1]) == 0:
        of_bias.zero_()  # no kernel will run
    return (of_query, of_key, of_value, of_bias), (of_query, of_key, of_value, None if bias is None else of_bias)
