"""Triton kernels of attention over normalised keys and values that all heads share; `normalized_region_attention.py`
beside this file launches them.

With n(x) = (x - mean) inverse, sums of products with n are taken of x itself:

    queries . n(x)   = (queries . x - sum(queries) mean) inverse
    weights n(x)     = (weights inverse) x - (weights inverse) . mean

In 16 bits, where x goes to tensor cores as it is: products are then exact, and there is nothing to round before them
but weights, which go in two parts. In fp32 the mean is subtracted first.

Channels are taken in blocks, and the rows of a small region are read again from cache for every step: means, then
variances and scores, then the result. Every element of a result is written by one program, once.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .regions import offset_at, place_of_query, program_number, tile_of_region


class Rows(NamedTuple):
    """Some rows of a tensor, of which a block of channels is loaded at a time: `offsets` and `exists` are `[rows]`."""

    pointer: Any
    offsets: Any
    exists: Any
    stride: Any  # of channels


class Normalized(NamedTuple):
    """What normalises rows, 0 where there is no row, and what a pass over them gives besides."""

    mean: Any  # [rows]
    inverse: Any  # of the standard deviation, [rows]
    products: Any  # of the queries and the normalised rows, [queries, rows]
    query_mean: Any  # [queries]


class Weights(NamedTuple):
    """Factors `[outputs, rows]` of rows of which `mean` `[rows]` is subtracted first, as `_weighted` takes them."""

    high: Any
    low: Any
    mean: Any
    mean_sum: Any  # weights times means, [outputs]
    scale: Any  # what the result is to be multiplied with, [outputs]


@triton.jit
def _token_rows(pointer, offsets, exists, strides):
    return Rows(pointer=pointer, offsets=offsets, exists=exists, stride=strides[4])


@triton.jit
def _query_rows(pointer, place, first_head, heads, strides, BLOCK_HEADS: tl.constexpr):
    """The heads of a query, or of the gradient of its output."""
    head = first_head + tl.arange(0, BLOCK_HEADS)
    offset = offset_at(strides, place.sample, place.at_t, place.at_h, place.at_w)
    offsets = offset + head.to(tl.int64) * strides[4]
    return Rows(pointer=pointer, offsets=offsets, exists=head < heads, stride=strides[5])


@triton.jit
def _contiguous(pointer, rows, exists, channels):
    """The rows of a contiguous result."""
    return Rows(pointer=pointer, offsets=rows.to(tl.int64) * channels, exists=exists, stride=1)


@triton.jit
def _places(rows, start, channels, BLOCK_C: tl.constexpr):
    channel = start + tl.arange(0, BLOCK_C)
    offsets = rows.offsets[:, None] + (channel.to(tl.int64) * rows.stride)[None, :]
    return offsets, rows.exists[:, None] & (channel < channels)[None, :]


@triton.jit
def _load(rows, start, channels, BLOCK_C: tl.constexpr):
    offsets, mask = _places(rows, start, channels, BLOCK_C)
    return tl.load(rows.pointer + offsets, mask=mask, other=0.0)


@triton.jit
def _store(rows, start, channels, tile, BLOCK_C: tl.constexpr):
    offsets, mask = _places(rows, start, channels, BLOCK_C)
    tl.store(rows.pointer + offsets, tile.to(rows.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(rows, queries, channels, eps, PRODUCTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Reads rows twice, and queries once if their products are wanted."""
    count: tl.constexpr = rows.offsets.shape[0]
    heads: tl.constexpr = queries.offsets.shape[0]
    total = tl.zeros([count, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        total += _load(rows, start, channels, BLOCK_C).to(tl.float32)
    mean = tl.sum(total, 1) / channels
    squares = tl.zeros([count, BLOCK_C], tl.float32)
    query_total = tl.zeros([heads, BLOCK_C], tl.float32)
    products = tl.zeros([heads, count], tl.float32)
    for start in range(0, channels, BLOCK_C):
        x = _load(rows, start, channels, BLOCK_C)
        exists = (start + tl.arange(0, BLOCK_C) < channels)[None, :]
        centered = tl.where(exists, x.to(tl.float32) - mean[:, None], 0.0)
        squares += centered * centered
        if PRODUCTS:
            q = _load(queries, start, channels, BLOCK_C)
            query_total += q.to(tl.float32)
            if x.dtype == tl.float32:
                products = tl.dot(q, tl.trans(centered), products, input_precision="ieee")
            else:
                products = tl.dot(q, tl.trans(x), products)
    inverse = tl.where(rows.exists, tl.rsqrt(tl.sum(squares, 1) / channels + eps), 0.0)
    query_sum = tl.sum(query_total, 1)
    if rows.pointer.dtype.element_ty != tl.float32:
        products -= query_sum[:, None] * mean[None, :]
    return Normalized(mean=mean, inverse=inverse, products=products * inverse[None, :], query_mean=query_sum / channels)


@triton.jit
def _split(weights, mean, dtype: tl.constexpr):
    """fp32 weights, for rows in `dtype`. In 16 bits the largest of an output becomes 2^14, and what rounding takes is a
    second part: in fp16 small ones would vanish otherwise."""
    if dtype == tl.float32:
        zero = tl.sum(weights, 1) * 0.0
        return Weights(high=weights, low=weights, mean=mean, mean_sum=zero, scale=zero)
    else:
        largest = tl.maximum(tl.max(tl.abs(weights), 1), 1e-30)
        largest = tl.where(largest < float("inf"), largest, 1.0)
        scaled = weights * (16384.0 / largest)[:, None]
        high = scaled.to(dtype)
        low = (scaled - high.to(tl.float32)).to(dtype)
        used = high.to(tl.float32) + low.to(tl.float32)
        mean_sum = tl.sum(used * mean[None, :], 1)
        return Weights(high=high, low=low, mean=mean, mean_sum=mean_sum, scale=largest / 16384.0)


@triton.jit
def _weighted(weights, x):
    """The sums of weights times rows x `[rows, BLOCK_C]` less their means: fp32 `[outputs, BLOCK_C]`."""
    if x.dtype == tl.float32:
        return tl.dot(weights.high, x - weights.mean[:, None], input_precision="ieee")
    else:
        product = tl.dot(weights.low, x, tl.dot(weights.high, x))
        return (product - weights.mean_sum[:, None]) * weights.scale[:, None]


@triton.jit
def _softmax(scores, exists):
    """Over keys, of `[heads, keys]`; 0 where there is no key."""
    scores = tl.where(exists[None, :], scores, float("-inf"))
    maximum = tl.max(scores, 1)
    # Where all are -inf, the division gives the reference's NaN.
    e = tl.exp(scores - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _row_gradient(x, mean, inverse, combined, along):
    """The gradient of rows x, where that of n(x) is `combined` with mean 0, and `along` the mean of its product with
    n(x)."""
    n = (x.to(tl.float32) - mean[:, None]) * inverse[:, None]
    return inverse[:, None] * (combined - n * along[:, None])


@triton.jit(do_not_specialize=["layout"])
def forward_kernel(
    query,
    key,
    value,
    output,
    query_strides,
    key_strides,
    value_strides,
    layout,
    eps,
    heads,
    channels,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program per region, for all heads. `output` is contiguous."""
    index = program_number(WIDE)
    if WIDE and index >= layout.queries:  # the grid is rounded up
        return
    place = place_of_query(layout, index, key_strides, value_strides, True, WIDE)
    key_offset, value_offset, _, exists = tile_of_region(
        layout, place, 0, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, True
    )
    queries = _query_rows(query, place, 0, heads, query_strides, BLOCK_HEADS)
    keys = _token_rows(key, key_offset, exists, key_strides)
    values = _token_rows(value, value_offset, exists, value_strides)
    of_keys = _normalize(keys, queries, channels, eps, True, BLOCK_C)
    of_values = _normalize(values, queries, channels, eps, False, BLOCK_C)
    p = _softmax(of_keys.products, exists)
    weights = _split(p * of_values.inverse[None, :], of_values.mean, value.dtype.element_ty)
    number = index.to(tl.int64) * heads + tl.arange(0, BLOCK_HEADS)
    outputs = _contiguous(output, number, queries.exists, channels)
    for start in range(0, channels, BLOCK_C):
        v = _load(values, start, channels, BLOCK_C)
        _store(outputs, start, channels, _weighted(weights, v), BLOCK_C)


@triton.jit(do_not_specialize=["layout"])
def backward_kernel(
    grad_output,
    query,
    key,
    value,
    grad_query,
    grad_key,
    grad_value,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    layout,
    eps,
    heads,
    channels,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Recomputes the softmax; the gradients are contiguous.

    With p the probabilities, g the gradient of the output and dp = g . n(value): the gradient of a score is
    ds = p (dp - sum p dp), that of n(value) is p g, that of n(key) is ds query.
    """
    index = program_number(WIDE)
    if WIDE and index >= layout.queries:
        return
    place = place_of_query(layout, index, key_strides, value_strides, True, WIDE)
    key_offset, value_offset, token, exists = tile_of_region(
        layout, place, 0, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, True
    )
    queries = _query_rows(query, place, 0, heads, query_strides, BLOCK_HEADS)
    grads = _query_rows(grad_output, place, 0, heads, grad_output_strides, BLOCK_HEADS)
    keys = _token_rows(key, key_offset, exists, key_strides)
    values = _token_rows(value, value_offset, exists, value_strides)
    of_keys = _normalize(keys, queries, channels, eps, True, BLOCK_C)
    of_values = _normalize(values, grads, channels, eps, True, BLOCK_C)
    p = _softmax(of_keys.products, exists)
    dp = tl.where(exists[None, :], of_values.products, 0.0)
    ds = tl.where(exists[None, :], p * (dp - tl.sum(p * dp, 1)[:, None]), 0.0)
    key_along = tl.sum(ds * tl.where(exists[None, :], of_keys.products, 0.0), 0) / channels
    value_along = tl.sum(p * dp, 0) / channels

    dtype: tl.constexpr = key.dtype.element_ty
    key_weights = _split(ds * of_keys.inverse[None, :], of_keys.mean, dtype)
    query_weights = _split(tl.trans(ds), of_keys.query_mean, dtype)
    grad_weights = _split(tl.trans(p), of_values.query_mean, dtype)
    number = index.to(tl.int64) * heads + tl.arange(0, BLOCK_HEADS)
    query_results = _contiguous(grad_query, number, queries.exists, channels)
    key_results = _contiguous(grad_key, token, exists, channels)
    value_results = _contiguous(grad_value, token, exists, channels)
    for start in range(0, channels, BLOCK_C):
        k = _load(keys, start, channels, BLOCK_C)
        _store(query_results, start, channels, _weighted(key_weights, k), BLOCK_C)
        q = _load(queries, start, channels, BLOCK_C)
        combined = _weighted(query_weights, q)
        result = _row_gradient(k, of_keys.mean, of_keys.inverse, combined, key_along)
        _store(key_results, start, channels, result, BLOCK_C)
        v = _load(values, start, channels, BLOCK_C)
        g = _load(grads, start, channels, BLOCK_C)
        combined = _weighted(grad_weights, g)
        result = _row_gradient(v, of_values.mean, of_values.inverse, combined, value_along)
        _store(value_results, start, channels, result, BLOCK_C)


# Large regions, or many heads: scores go through memory, and programs share a region ---------------------------------


@triton.jit(do_not_specialize=["layout", "chunks", "head_blocks"])
def products_kernel(
    query,
    key,
    products,
    means,
    inverses,
    query_strides,
    key_strides,
    layout,
    eps,
    heads,
    channels,
    chunks,
    head_blocks,
    keys,
    absent,
    PRODUCTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of a chunk of a region's keys: `means` and `inverses` `[queries, keys]`, which normalise them, and `products`
    `[queries, heads, keys]` of the heads and the normalised keys, where wanted; `absent` where there is no key."""
    program = program_number(WIDE)
    head_block, program = program % head_blocks, program // head_blocks
    chunk, index = program % chunks, program // chunks
    if WIDE and index >= layout.queries:
        return
    place = place_of_query(layout, index, key_strides, key_strides, False, WIDE)
    j = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    offset, _, _, exists = tile_of_region(
        layout, place, chunk * BLOCK_K, key_strides, key_strides, 0, 0, 0, BLOCK_K, False
    )
    queries = _query_rows(query, place, head_block * BLOCK_HEADS, heads, query_strides, BLOCK_HEADS)
    rows = _token_rows(key, offset, exists, key_strides)
    of_keys = _normalize(rows, queries, channels, eps, PRODUCTS, BLOCK_C)
    index = index.to(tl.int64)
    if head_block == 0:
        tl.store(means + (index * keys + j), of_keys.mean, mask=j < keys)
        tl.store(inverses + (index * keys + j), of_keys.inverse, mask=j < keys)
    if PRODUCTS:
        head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        offsets = ((index * heads + head) * keys)[:, None] + j[None, :]
        result = tl.where(exists[None, :], of_keys.products, absent)
        tl.store(products + offsets, result, mask=(head < heads)[:, None] & (j < keys)[None, :])


@triton.jit
def _load_weights(weights, index, head, heads, j, keys):
    """`[heads, keys]` of fp32 weights `[queries, heads, keys]`."""
    offsets = ((index * heads + head) * keys)[:, None] + j[None, :]
    return tl.load(weights + offsets, mask=(head < heads)[:, None] & (j < keys)[None, :], other=0.0)


@triton.jit(do_not_specialize=["layout", "head_blocks", "channel_blocks"])
def pool_kernel(
    key,
    weights,
    means,
    inverses,
    output,
    key_strides,
    layout,
    heads,
    channels,
    head_blocks,
    channel_blocks,
    keys,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums of a region's normalised keys with weights `[queries, heads, keys]`, for a block of heads and of
    channels. `output` is contiguous."""
    program = program_number(WIDE)
    start, program = program % channel_blocks * BLOCK_C, program // channel_blocks
    head_block, index = program % head_blocks, program // head_blocks
    if WIDE:
        start = start.to(tl.int32)
        if index >= layout.queries:
            return
    place = place_of_query(layout, index, key_strides, key_strides, False, WIDE)
    index = index.to(tl.int64)
    head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    total = tl.zeros([BLOCK_HEADS, BLOCK_C], tl.float32)
    for first in range(0, place.size_t * place.size_h * place.size_w, BLOCK_K):
        offset, _, _, exists = tile_of_region(layout, place, first, key_strides, key_strides, 0, 0, 0, BLOCK_K, False)
        j = first + tl.arange(0, BLOCK_K)
        mean = tl.load(means + (index * keys + j), mask=j < keys, other=0.0)
        inverse = tl.load(inverses + (index * keys + j), mask=j < keys, other=0.0)
        w = _load_weights(weights, index, head, heads, j, keys) * inverse[None, :]
        rows = _token_rows(key, offset, exists, key_strides)
        x = _load(rows, start, channels, BLOCK_C)
        total += _weighted(_split(w, mean, key.dtype.element_ty), x)
    outputs = _contiguous(output, index * heads + head, head < heads, channels)
    _store(outputs, start, channels, total, BLOCK_C)


@triton.jit(do_not_specialize=["layout", "chunks", "channel_blocks"])
def row_gradients_kernel(
    query,
    key,
    weights,
    means,
    inverses,
    query_means,
    along,
    grad_key,
    query_strides,
    key_strides,
    layout,
    heads,
    channels,
    chunks,
    channel_blocks,
    keys,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradients of a chunk of a region's keys, for a block of channels, where those of the normalised keys are the
    sums of the heads of `query` with weights `[queries, heads, keys]`. `query_means` is `[queries, heads]`, `along`
    `[queries, keys]`, `grad_key` contiguous."""
    program = program_number(WIDE)
    start, program = program % channel_blocks * BLOCK_C, program // channel_blocks
    chunk, index = program % chunks, program // chunks
    if WIDE:
        start = start.to(tl.int32)
        if index >= layout.queries:
            return
    place = place_of_query(layout, index, key_strides, key_strides, False, WIDE)
    offset, _, token, exists = tile_of_region(
        layout, place, chunk * BLOCK_K, key_strides, key_strides, 0, 0, 0, BLOCK_K, False
    )
    index = index.to(tl.int64)
    j = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    combined = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)
        query_mean = tl.load(query_means + (index * heads + head), mask=head < heads, other=0.0)
        w = tl.trans(_load_weights(weights, index, head, heads, j, keys))
        queries = _query_rows(query, place, first, heads, query_strides, BLOCK_HEADS)
        q = _load(queries, start, channels, BLOCK_C)
        combined += _weighted(_split(w, query_mean, key.dtype.element_ty), q)
    mean = tl.load(means + (index * keys + j), mask=j < keys, other=0.0)
    inverse = tl.load(inverses + (index * keys + j), mask=j < keys, other=0.0)
    key_along = tl.load(along + (index * keys + j), mask=j < keys, other=0.0)
    rows = _token_rows(key, offset, exists, key_strides)
    x = _load(rows, start, channels, BLOCK_C)
    results = _contiguous(grad_key, token, exists, channels)
    _store(results, start, channels, _row_gradient(x, mean, inverse, combined, key_along), BLOCK_C)
