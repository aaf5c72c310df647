"""Launches the Triton kernels of normalized_region_attention and its backward.

A region of few keys is one program, and its scores stay in registers. Larger ones are shared by programs, with scores
in memory: as much of it, in fp32, as one channel of the keys takes for each head. (Twice in the backward pass, and as
much again for what the softmax leaves. Partial regions count as whole ones.)

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. What is launched depends on shapes, dtypes and strides alone, and nothing is read back from the device, so that
calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import launching
from .launching import dense_layout, next_power_of_2, normalized_strides, on_device_of

if TYPE_CHECKING:
    from .regions import Layout

# A matrix product takes no fewer rows or columns.
_MIN_BLOCK = 16
# The most keys and the most scores, of keys and heads, of a region that is one program.
_MAX_KEYS = 64
_MAX_SCORES = 2048
# Larger regions: keys and heads of a tile.
_CHUNK_KEYS = 64
_CHUNK_HEADS = 16
# Elements of a tile of keys or heads, and the warps that share it.
_TILE = 2048
_MAX_CHANNELS = 128
_WARPS = 4
# A CUDA grid has at most this many blocks along its first axis, and 65,535 along the second.
_MAX_PROGRAMS = 2**31 - 1
# From this many tokens, queries or programs on, kernels count in 64 bits: below, no sum of two counts leaves int32.
_WIDE_FROM = 2**29


class _Blocks(NamedTuple):
    keys: int
    heads: int
    channels: int


def _blocks(keys: int, heads: int, channels: int, dtype: torch.dtype) -> _Blocks | None:
    """The tile of a region that is one program; None where it is too large for that."""
    block_keys, block_heads = (max(_MIN_BLOCK, next_power_of_2(n)) for n in (keys, heads))
    if keys > _MAX_KEYS or block_keys * block_heads > _MAX_SCORES:
        return None
    return _Blocks(block_keys, block_heads, _block_channels(max(block_keys, block_heads), channels, dtype))


def _block_channels(rows: int, channels: int, dtype: torch.dtype) -> int:
    most = min(_MAX_CHANNELS, _TILE // rows)
    # With more, threads would spill registers: in fp32 each holds whole rows of what a product takes, and where rows
    # are no whole vectors the offset of every element.
    if dtype == torch.float32 or channels % 16:
        most //= 4
    return max(_MIN_BLOCK, min(next_power_of_2(channels), most))


def _launch(
    kernel: Any,
    programs: int,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor],
    layout: Layout,
    *numbers: float,
    blocks: _Blocks,
    **constants: Any,
) -> None:
    """Runs a kernel on strided `inputs` and contiguous `others`, in as many programs."""
    columns = -(-programs // _MAX_PROGRAMS)
    # (sample, T, H, W, channel) of tokens, (sample, T, H, W, head, channel) of queries
    strides = [normalized_strides(tensor, tensor.dim()) for tensor in inputs]
    launching.launch(
        kernel,
        (-(-programs // columns), columns),
        *inputs,
        *others,
        *strides,
        layout,
        *numbers,
        BLOCK_K=blocks.keys,
        BLOCK_HEADS=blocks.heads,
        BLOCK_C=blocks.channels,
        WIDE=max(programs, layout.tokens) >= _WIDE_FROM,
        num_warps=_WARPS,
        **constants,
    )


def _tile(layout: Layout) -> dict[str, int]:
    return dict(zip(("TILE_T", "TILE_H", "TILE_W"), layout.region, strict=True))


def normalized_region_attention(
    query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], eps: float = 1e-5
) -> Tensor:
    """query `[B, T', H', W', heads, E]`, key and value `[B, T, H, W, E]` -> like query."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    from .normalized_region_attention_kernels import forward_kernel

    heads, channels = query.shape[-2:]
    layout = dense_layout(query, key, region)
    blocks = _blocks(math.prod(layout.region), heads, channels, key.dtype)
    with on_device_of(query):
        if blocks is None:
            large = _Large(layout, heads, channels, key.dtype, eps)
            scores, _, _ = large.products(query, key, -math.inf)
            _, means, inverses = large.products(query, value, None)
            large.pool(value, scores.softmax(-1), means, inverses, output)
            return output
        _launch(
            forward_kernel,
            layout.queries,
            (query, key, value),
            (output,),
            layout,
            float(eps),
            heads,
            channels,
            blocks=blocks,
            **_tile(layout),
        )
    return output


def normalized_region_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, of their shapes, from that of the output."""
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    if query.numel() == 0:  # without heads keys are of no consequence
        return tuple(gradient.zero_() for gradient in gradients)
    from .normalized_region_attention_kernels import backward_kernel

    heads, channels = query.shape[-2:]
    layout = dense_layout(query, key, region)
    blocks = _blocks(math.prod(layout.region), heads, channels, key.dtype)
    with on_device_of(query):
        if blocks is None:
            _large_backward(
                _Large(layout, heads, channels, key.dtype, eps), (grad_output, query, key, value), gradients
            )
            return gradients
        _launch(
            backward_kernel,
            layout.queries,
            (grad_output, query, key, value),
            gradients,
            layout,
            float(eps),
            heads,
            channels,
            blocks=blocks,
            **_tile(layout),
        )
    return gradients


def _large_backward(large: _Large, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    grad_output, query, key, value = tensors
    grad_query, grad_key, grad_value = gradients
    scores, *of_keys = large.products(query, key, -math.inf)
    dp, *of_values = large.products(grad_output, value, 0.0)
    p = scores.softmax(-1)
    key_is_there = scores != -math.inf
    dp *= p
    value_along = dp.sum(1) / large.channels
    ds = dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1)
    key_along = scores.mul_(ds).where(key_is_there, 0).sum(1) / large.channels
    large.pool(key, ds, *of_keys, grad_query)
    large.row_gradients(query, key, ds, *of_keys, key_along, grad_key)
    large.row_gradients(grad_output, value, p, *of_values, value_along, grad_value)


class _Large:
    """The steps for regions that programs share. Scratch is fp32, `[queries, heads, keys]` and less."""

    def __init__(self, layout: Layout, heads: int, channels: int, dtype: torch.dtype, eps: float) -> None:
        self.layout, self.heads, self.channels, self.eps = layout, heads, channels, float(eps)
        self.keys = math.prod(layout.region)
        self.blocks = _Blocks(
            min(_CHUNK_KEYS, max(_MIN_BLOCK, next_power_of_2(self.keys))),
            _CHUNK_HEADS,
            _block_channels(_CHUNK_KEYS, channels, dtype),
        )
        self.chunks = -(-self.keys // self.blocks.keys)
        self.head_blocks = -(-heads // self.blocks.heads)
        self.channel_blocks = -(-channels // self.blocks.channels)

    def products(self, query: Tensor, key: Tensor, absent: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """The products of heads and normalised keys, `absent` where there is no key in a region; and the means and the
        inverse standard deviations of keys. Without `absent` these alone."""
        from .normalized_region_attention_kernels import products_kernel

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=key.device)

        queries = self.layout.queries
        wanted = absent is not None
        products = empty(queries, self.heads, self.keys) if wanted else empty(0)
        means, inverses = empty(queries, self.keys), empty(queries, self.keys)
        head_blocks = self.head_blocks if wanted else 1
        _launch(
            products_kernel,
            queries * self.chunks * head_blocks,
            (query, key),
            (products, means, inverses),
            self.layout,
            self.eps,
            self.heads,
            self.channels,
            self.chunks,
            head_blocks,
            self.keys,
            absent if wanted else 0.0,
            blocks=self.blocks,
            PRODUCTS=wanted,
        )
        return products, means, inverses

    def pool(self, key: Tensor, weights: Tensor, means: Tensor, inverses: Tensor, output: Tensor) -> None:
        from .normalized_region_attention_kernels import pool_kernel

        _launch(
            pool_kernel,
            self.layout.queries * self.head_blocks * self.channel_blocks,
            (key,),
            (weights, means, inverses, output),
            self.layout,
            self.heads,
            self.channels,
            self.head_blocks,
            self.channel_blocks,
            self.keys,
            blocks=self.blocks,
        )

    def row_gradients(
        self,
        query: Tensor,
        key: Tensor,
        weights: Tensor,
        means: Tensor,
        inverses: Tensor,
        along: Tensor,
        grad_key: Tensor,
    ) -> None:
        from .normalized_region_attention_kernels import row_gradients_kernel

        query_means = query.mean(-1, dtype=torch.float32).contiguous()
        _launch(
            row_gradients_kernel,
            self.layout.queries * self.chunks * self.channel_blocks,
            (query, key),
            (weights, means, inverses, query_means, along.contiguous(), grad_key),
            self.layout,
            self.heads,
            self.channels,
            self.chunks,
            self.channel_blocks,
            self.keys,
            blocks=self.blocks,
        )
