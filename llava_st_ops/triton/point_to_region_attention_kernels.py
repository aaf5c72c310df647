"""Triton kernels of point-to-region attention; `point_to_region_attention.py` beside this file launches them.

One program serves one query, and so one region, for `BLOCK_HEADS` heads. A tile of keys is loaded as
`[BLOCK_K, BLOCK_HEADS * BLOCK_D]`: the heads of a token lie next to each other in memory. Every version of Triton then
spreads lanes and warps over heads and D first, and in a small region a lane holds its elements of every key: softmax
and sums over keys stay within the lane. (With three axes to load, some versions take keys before heads.)

Everything is widened to fp32 when it is loaded. Every element of a result is written by one program, once.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl

from .regions import offset_at, place_of_query, program_number, tile_of_region


@triton.jit
def _row(
    program,
    head_blocks,
    heads,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The part of a token's row that a program works on, flat: heads, elements of a head, and which of them exist in
    keys and in values, all `[BLOCK_HEADS * BLOCK_D]`."""
    element = tl.arange(0, BLOCK_HEADS * BLOCK_D)
    head = program % head_blocks * BLOCK_HEADS + element // BLOCK_D
    d = element % BLOCK_D
    return head.to(tl.int64), d.to(tl.int64), (head < heads) & (d < D), (head < heads) & (d < VALUE_D)


@triton.jit
def _load_query(
    pointer, place, head, d, strides, mask, ALIGNMENT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The row of a query, or of the gradient of its output -> fp32 `[1, BLOCK_HEADS, BLOCK_D]`."""
    offsets = offset_at(strides, place.sample, place.at_t, place.at_h, place.at_w) + head * strides[4] + d * strides[5]
    row = tl.load(pointer + tl.multiple_of(offsets, ALIGNMENT), mask=mask, other=0.0)
    return tl.reshape(row.to(tl.float32), (1, BLOCK_HEADS, BLOCK_D))


@triton.jit
def _load_tile(
    pointer,
    offsets,
    head,
    d,
    strides,
    mask,
    ALIGNMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of key or value at `offsets` `[BLOCK_K]` -> fp32 `[BLOCK_K, BLOCK_HEADS, BLOCK_D]`."""
    offsets = offsets[:, None] + (head * strides[4] + d * strides[5])[None, :]
    tile = tl.load(pointer + tl.multiple_of(offsets, (1, ALIGNMENT)), mask=mask, other=0.0)
    return tl.reshape(tile.to(tl.float32), (BLOCK_K, BLOCK_HEADS, BLOCK_D))


@triton.jit
def _load_bias(pointer, token, exists, program, head_blocks, heads, BLOCK_HEADS: tl.constexpr):
    """The contiguous bias of tokens `token`, fp32 `[BLOCK_K, BLOCK_HEADS]`, and which keys take part: those that exist
    and are not masked by a bias of -inf. Without a bias the latter are `[BLOCK_K, 1]`."""
    if pointer is None:
        return 0.0, exists[:, None]
    else:
        head = program % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = exists[:, None] & (head < heads)[None, :]
        bias = tl.load(pointer + (token * heads)[:, None] + head.to(tl.int64)[None, :], mask=mask, other=0.0)
        bias = bias.to(tl.float32)
        return bias, mask & (bias != float("-inf"))


@triton.jit
def _hide_masked(tile, takes_part, bias):
    """A tile `[BLOCK_K, BLOCK_HEADS, BLOCK_D]` with zeros for masked keys, whatever it holds. Loads do not wait for the
    bias this way."""
    return tile if bias is None else tl.where(takes_part[:, :, None], tile, 0.0)


@triton.jit
def _scores(q, k, scale, added, takes_part, bias):
    """q `[1, BLOCK_HEADS, BLOCK_D]`, k `[BLOCK_K, BLOCK_HEADS, BLOCK_D]` -> `[BLOCK_K, BLOCK_HEADS]`, -inf for what
    does not take part."""
    scores = tl.sum(q * k, axis=2) * scale
    if bias is not None:
        scores += added
    return tl.where(takes_part, scores, float("-inf"))


@triton.jit
def _inverse(total, bias):
    """What normalises weights. Without a bias their sum is zero only where no key exists or all scores are -inf: NaN,
    as in the reference. With one, all keys may be masked: zeros."""
    return 1.0 / total if bias is None else tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def _finite_maximum(maximum):
    """What to subtract from scores. Where all are -inf so far, zero: -inf - -inf would be NaN, and a later tile may
    hold greater scores. If none does, the sum of exponentials stays 0 and the division gives the reference's NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["layout"])
def forward_kernel(
    query,
    key,
    value,
    bias,
    output,
    query_strides,
    key_strides,
    value_strides,
    layout,
    scale,
    heads,
    head_blocks,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Reads a region's keys and values once, tile by tile, with an online softmax. `output` is contiguous."""
    program = program_number(WIDE)
    # The blocks of heads of a region run next to each other: together they read whole rows of memory.
    index = program // head_blocks
    if WIDE and index >= layout.queries:  # the grid is rounded up
        return
    head, d, row_mask, value_mask = _row(program, head_blocks, heads, D, VALUE_D, BLOCK_HEADS, BLOCK_D)
    place = place_of_query(layout, index, key_strides, value_strides, SINGLE_TILE, WIDE)
    q = _load_query(query, place, head, d, query_strides, row_mask, ALIGNMENT, BLOCK_HEADS, BLOCK_D)

    maximum = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    pooled = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    keys = BLOCK_K if SINGLE_TILE else place.size_t * place.size_h * place.size_w
    for start in range(0, keys, BLOCK_K):
        key_offset, value_offset, token, exists = tile_of_region(
            layout, place, start, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, SINGLE_TILE
        )
        mask, v_mask = exists[:, None] & row_mask[None, :], exists[:, None] & value_mask[None, :]
        k = _load_tile(key, key_offset, head, d, key_strides, mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
        v = _load_tile(value, value_offset, head, d, value_strides, v_mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
        added, takes_part = _load_bias(bias, token, exists, program, head_blocks, heads, BLOCK_HEADS)
        v = _hide_masked(v, takes_part, bias)
        scores = _scores(q, k, scale, added, takes_part, bias)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shift = _finite_maximum(new_maximum)
        correction = tl.exp(maximum - shift)
        p = tl.exp(scores - shift[None, :])
        total = total * correction + tl.sum(p, axis=0)
        pooled = pooled * correction[:, None] + tl.sum(p[:, :, None] * v, axis=0)
        maximum = new_maximum
    if bias is None:
        result = pooled / total[:, None]
    else:
        result = tl.where((total == 0.0)[:, None], 0.0, pooled / total[:, None])  # all keys masked
    if layout.grid is None:
        result = tl.where(place.size_t > 0, result, 0.0)  # no keys at all
    result = tl.reshape(result, (BLOCK_HEADS * BLOCK_D,))
    offsets = (index.to(tl.int64) * heads + head) * VALUE_D + d
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=value_mask)


@triton.jit
def _score_gradients(p, gv, pooled_gv, takes_part):
    """Gradients of the scores `[BLOCK_K, BLOCK_HEADS]`. The mask keeps 0 * (0 - inf) out of the sum over keys where no
    key exists."""
    return tl.where(takes_part, p * (gv - pooled_gv[None, :]), 0.0)


@triton.jit
def _store_bias_gradient(pointer, token, score_grad, exists, program, head_blocks, heads, BLOCK_HEADS: tl.constexpr):
    """Of tokens `token`, contiguous like the bias; where there is one."""
    if pointer is not None:
        head = program % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        offsets = (token * heads)[:, None] + head.to(tl.int64)[None, :]
        mask = exists[:, None] & (head < heads)[None, :]
        tl.store(pointer + offsets, score_grad.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_tile(
    pointer,
    token,
    weight,
    row,
    takes_part,
    bias,
    head,
    d,
    heads,
    mask,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores `weight[k, head] * row[0, head, d]` to the rows `token` of a contiguous gradient of key or value."""
    tile = _hide_masked(weight[:, :, None] * row, takes_part, bias)
    tile = tl.reshape(tile, (BLOCK_K, BLOCK_HEADS * BLOCK_D))
    offsets = (token * heads * D)[:, None] + (head * D + d)[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["layout"])
def backward_kernel(
    grad_output,
    query,
    key,
    value,
    bias,
    grad_query,
    grad_key,
    grad_value,
    grad_bias,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    layout,
    scale,
    heads,
    head_blocks,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Recomputes the softmax from query, key and value; the gradients are contiguous.

    With p the probabilities and g the gradient of the output: grad_value = p g, and the gradient of a score is
    p (g.v - sum p g.v). A region of one tile is read once, a larger one twice: the first pass finds the maximum, the
    sum of exponentials and the sum of p g.v, the second the gradients.
    """
    program = program_number(WIDE)
    index = program // head_blocks
    if WIDE and index >= layout.queries:
        return
    head, d, row_mask, value_mask = _row(program, head_blocks, heads, D, VALUE_D, BLOCK_HEADS, BLOCK_D)
    place = place_of_query(layout, index, key_strides, value_strides, SINGLE_TILE, WIDE)
    q = _load_query(query, place, head, d, query_strides, row_mask, ALIGNMENT, BLOCK_HEADS, BLOCK_D)
    g = _load_query(grad_output, place, head, d, grad_output_strides, value_mask, ALIGNMENT, BLOCK_HEADS, BLOCK_D)

    if SINGLE_TILE:
        key_offset, value_offset, token, exists = tile_of_region(
            layout, place, 0, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, SINGLE_TILE
        )
        mask, v_mask = exists[:, None] & row_mask[None, :], exists[:, None] & value_mask[None, :]
        k = _load_tile(key, key_offset, head, d, key_strides, mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
        v = _load_tile(value, value_offset, head, d, value_strides, v_mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
        added, takes_part = _load_bias(bias, token, exists, program, head_blocks, heads, BLOCK_HEADS)
        k, v = _hide_masked(k, takes_part, bias), _hide_masked(v, takes_part, bias)
        scores = _scores(q, k, scale, added, takes_part, bias)
        p = tl.exp(scores - _finite_maximum(tl.max(scores, axis=0))[None, :])
        p *= _inverse(tl.sum(p, axis=0), bias)[None, :]
        gv = tl.sum(g * v, axis=2)
        score_grad = _score_gradients(p, gv, tl.sum(p * gv, axis=0), takes_part)
        _store_bias_gradient(grad_bias, token, score_grad, exists, program, head_blocks, heads, BLOCK_HEADS)
        score_grad *= scale
        _store_tile(
            grad_key, token, score_grad, q, takes_part, bias, head, d, heads, mask, D, BLOCK_K, BLOCK_HEADS, BLOCK_D
        )
        _store_tile(
            grad_value, token, p, g, takes_part, bias, head, d, heads, v_mask, VALUE_D, BLOCK_K, BLOCK_HEADS, BLOCK_D
        )
        query_grad = tl.sum(score_grad[:, :, None] * k, axis=0)
    else:
        keys = place.size_t * place.size_h * place.size_w
        maximum = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_HEADS], tl.float32)
        pooled_gv = tl.zeros([BLOCK_HEADS], tl.float32)
        for start in range(0, keys, BLOCK_K):
            key_offset, value_offset, token, exists = tile_of_region(
                layout, place, start, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, SINGLE_TILE
            )
            mask, v_mask = exists[:, None] & row_mask[None, :], exists[:, None] & value_mask[None, :]
            k = _load_tile(key, key_offset, head, d, key_strides, mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
            v = _load_tile(
                value, value_offset, head, d, value_strides, v_mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D
            )
            added, takes_part = _load_bias(bias, token, exists, program, head_blocks, heads, BLOCK_HEADS)
            k, v = _hide_masked(k, takes_part, bias), _hide_masked(v, takes_part, bias)
            scores = _scores(q, k, scale, added, takes_part, bias)
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
            shift = _finite_maximum(new_maximum)
            correction = tl.exp(maximum - shift)
            p = tl.exp(scores - shift[None, :])
            total = total * correction + tl.sum(p, axis=0)
            pooled_gv = pooled_gv * correction + tl.sum(p * tl.sum(g * v, axis=2), axis=0)
            maximum = new_maximum
        shift = _finite_maximum(maximum)
        inverse_total = _inverse(total, bias)
        pooled_gv *= inverse_total
        query_grad = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
        for start in range(0, keys, BLOCK_K):
            key_offset, value_offset, token, exists = tile_of_region(
                layout, place, start, key_strides, value_strides, TILE_T, TILE_H, TILE_W, BLOCK_K, SINGLE_TILE
            )
            mask, v_mask = exists[:, None] & row_mask[None, :], exists[:, None] & value_mask[None, :]
            k = _load_tile(key, key_offset, head, d, key_strides, mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D)
            v = _load_tile(
                value, value_offset, head, d, value_strides, v_mask, ALIGNMENT, BLOCK_K, BLOCK_HEADS, BLOCK_D
            )
            added, takes_part = _load_bias(bias, token, exists, program, head_blocks, heads, BLOCK_HEADS)
            k, v = _hide_masked(k, takes_part, bias), _hide_masked(v, takes_part, bias)
            p = tl.exp(_scores(q, k, scale, added, takes_part, bias) - shift[None, :]) * inverse_total[None, :]
            gv = tl.sum(g * v, axis=2)
            score_grad = _score_gradients(p, gv, pooled_gv, takes_part)
            _store_bias_gradient(grad_bias, token, score_grad, exists, program, head_blocks, heads, BLOCK_HEADS)
            score_grad *= scale
            _store_tile(
                grad_key, token, score_grad, q, takes_part, bias, head, d, heads, mask, D, BLOCK_K, BLOCK_HEADS, BLOCK_D
            )
            _store_tile(
                grad_value,
                token,
                p,
                g,
                takes_part,
                bias,
                head,
                d,
                heads,
                v_mask,
                VALUE_D,
                BLOCK_K,
                BLOCK_HEADS,
                BLOCK_D,
            )
            query_grad += tl.sum(score_grad[:, :, None] * k, axis=0)
    if layout.grid is None:
        query_grad = tl.where(place.size_t > 0, query_grad, 0.0)  # no keys at all
    query_grad = tl.reshape(query_grad, (BLOCK_HEADS * BLOCK_D,))
    offsets = (index.to(tl.int64) * heads + head) * D + d
    tl.store(grad_query + offsets, query_grad.to(grad_query.dtype.element_ty), mask=row_mask)
