"""Triton kernels of lape_add and of its backward, dense and packed; `addition.py` beside this file launches them.

Everything is widened to fp32 when it is loaded. Every element of a result is written by one program, once. Packed
grids are read on the device, and nobody may have checked them: whatever they hold, offsets stay inside the tensors.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .anchors import patch_between, table_row
from .regions import capped_product, load_grid, past_the_end, video_of_query


class Tables(NamedTuple):
    """The three tables of anchors: pointers, strides and numbers of rows."""

    temporal: Any
    height: Any
    width: Any
    temporal_strides: tuple[int, int]
    height_strides: tuple[int, int]
    width_strides: tuple[int, int]
    counts: tuple[int, int, int]


@triton.jit
def _rounded(x, dtype: tl.constexpr, ROUND_EVERY_ADDITION: tl.constexpr):
    if ROUND_EVERY_ADDITION:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _sum(x, h, w, t, dtype: tl.constexpr, ROUND_EVERY_ADDITION: tl.constexpr):
    """((x + h) + w) + t in `dtype`. The rows of the tables were rounded before, if need be."""
    x = _rounded(x.to(tl.float32) + h, dtype, ROUND_EVERY_ADDITION)
    return (_rounded(x + w, dtype, ROUND_EVERY_ADDITION) + t).to(dtype)


@triton.jit(do_not_specialize=["sizes", "frames", "width_blocks", "channel_blocks"])
def add_kernel(
    features,
    output,
    tables,
    features_strides,
    output_strides,
    sizes,
    frames,
    channels,
    width_blocks,
    channel_blocks,
    SPATIAL: tl.constexpr,
    ROUND_EVERY_ADDITION: tl.constexpr,
    WIDE: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`[B, T, H, W, C]`. A program adds to a part of a row of patches, in `FRAMES` frames of all `frames = B T`: rows
    of the tables of height and width are interpolated once for them. `output` may be `features`."""
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // channel_blocks
    w = program % width_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program = program // width_blocks
    h = program % sizes[1]
    first = program // sizes[1] * FRAMES
    if WIDE:
        h, w, first = h.to(tl.int64), w.to(tl.int64), first.to(tl.int64)
    dtype: tl.constexpr = features.dtype.element_ty
    exists = channel < channels
    mask = (w < sizes[2])[:, None] & exists[None, :]
    channel = channel.to(tl.int64)
    h_between = patch_between(h, sizes[1], tables.counts[1], SPATIAL)
    w_between = patch_between(w[:, None], sizes[2], tables.counts[2], SPATIAL)
    h_row = table_row(tables.height, tables.height_strides, h_between, channel, exists)
    h_row = _rounded(h_row, dtype, ROUND_EVERY_ADDITION)[None, :]
    w_row = table_row(tables.width, tables.width_strides, w_between, channel[None, :], mask)
    w_row = _rounded(w_row, dtype, ROUND_EVERY_ADDITION)
    h, w = h.to(tl.int64), w.to(tl.int64)
    here = (h * features_strides[2] + w * features_strides[3])[:, None] + (channel * features_strides[4])[None, :]
    there = (h * output_strides[2] + w * output_strides[3])[:, None] + (channel * output_strides[4])[None, :]
    for frame in range(first, tl.minimum(first + FRAMES, frames)):
        t = frame % sizes[0]
        t_between = patch_between(t, sizes[0], tables.counts[0], "ends")
        t_row = table_row(tables.temporal, tables.temporal_strides, t_between, channel, exists)
        t_row = _rounded(t_row, dtype, ROUND_EVERY_ADDITION)[None, :]
        sample, t = (frame // sizes[0]).to(tl.int64), t.to(tl.int64)
        x = tl.load(features + (sample * features_strides[0] + t * features_strides[1] + here), mask=mask, other=0.0)
        result = _sum(x, h_row, w_row, t_row, dtype, ROUND_EVERY_ADDITION)
        tl.store(output + (sample * output_strides[0] + t * output_strides[1] + there), result, mask=mask)


@triton.jit(do_not_specialize=["layout", "channel_blocks"])
def add_packed_kernel(
    features,
    output,
    tables,
    features_strides,
    layout,
    channels,
    channel_blocks,
    SPATIAL: tl.constexpr,
    ROUND_EVERY_ADDITION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`[tokens, C]`: a program takes some tokens, which may be of several videos. `output` is contiguous. A token of no
    video stays as it is."""
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = (program // channel_blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    video = video_of_query(layout, token)
    is_token = token < layout.tokens
    is_added_to = is_token & (token < tl.load(layout.offsets + (tl.full([], 0, tl.int64) + layout.videos) * 2))
    limit = past_the_end(layout)
    size_t, size_h, size_w = load_grid(layout, video, limit, is_added_to)
    size_hw = tl.maximum(capped_product(size_h, size_w, limit), 1)
    at = tl.where(is_added_to, token - tl.load(layout.offsets + video * 2), 0)
    if not WIDE:  # 64-bit divisions are slow, and nothing here exceeds the limit
        at, size_t, size_h, size_w = at.to(tl.int32), size_t.to(tl.int32), size_h.to(tl.int32), size_w.to(tl.int32)
        size_hw = size_hw.to(tl.int32)
    some_w = tl.maximum(size_w, 1)
    t, h, w = at // size_hw, at % size_hw // some_w, at % size_hw % some_w
    dtype: tl.constexpr = features.dtype.element_ty
    exists = is_token[:, None] & (channel < channels)[None, :]
    mask = is_added_to[:, None] & exists
    channel = channel.to(tl.int64)[None, :]
    t_between = patch_between(t[:, None], size_t[:, None], tables.counts[0], "ends")
    h_between = patch_between(h[:, None], size_h[:, None], tables.counts[1], SPATIAL)
    w_between = patch_between(w[:, None], size_w[:, None], tables.counts[2], SPATIAL)
    t_row = table_row(tables.temporal, tables.temporal_strides, t_between, channel, mask)
    h_row = table_row(tables.height, tables.height_strides, h_between, channel, mask)
    w_row = table_row(tables.width, tables.width_strides, w_between, channel, mask)
    token = token[:, None]
    x = tl.load(features + (token * features_strides[0] + channel * features_strides[1]), mask=exists, other=0.0)
    result = _sum(
        x,
        _rounded(h_row, dtype, ROUND_EVERY_ADDITION),
        _rounded(w_row, dtype, ROUND_EVERY_ADDITION),
        _rounded(t_row, dtype, ROUND_EVERY_ADDITION),
        dtype,
        ROUND_EVERY_ADDITION,
    )
    tl.store(output + (token * channels + channel), tl.where(mask, result, x), mask=exists)


@triton.jit
def _first_video(layout, token):
    """The video of a token, or the sample of a dense one."""
    if layout.grid is None:
        return video_of_query(layout, token)
    else:
        size = (token * 0 + layout.grid[0]) * layout.grid[1] * layout.grid[2]
        return token // tl.maximum(size, 1)


@triton.jit
def _load_video(layout, video, strides):
    """Of a video: the number of its first token and of the one past its last, its sizes, the offset of its first token,
    and the offsets from one frame and from one row of patches to the next. All are int64."""
    if layout.grid is None:
        entry = layout.offsets + video * 2
        first, end = tl.load(entry), tl.load(entry + 2)
        limit = past_the_end(layout)
        t, h, w = load_grid(layout, video, limit, first < end)
        row = w * strides[3]
        return first, end, t, h, w, first * strides[3], h * row, row
    else:
        zero = video * 0
        t, h, w = zero + layout.grid[0], zero + layout.grid[1], zero + layout.grid[2]
        size = t * h * w
        first = video * size
        return first, first + size, t, h, w, video * strides[0], zero + strides[1], zero + strides[2]


@triton.jit
def _within(column, first, end, BLOCK_W: tl.constexpr):
    """Which columns `[BLOCK_W]` are in [first, end), which are int64: compared in 32 bits."""
    first = tl.minimum(tl.maximum(first, 0), BLOCK_W).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), BLOCK_W).to(tl.int32)
    return (column >= first) & (column < end)


@triton.jit
def _add_to(rows, between, gradient, channel, channels, exists):
    """Adds the gradient of an interpolated row to rows `[anchors, channels]` of this program alone."""
    low = rows + (between.low.to(tl.int64) * channels + channel)
    tl.store(low, tl.load(low, mask=exists, other=0.0) + between.low_weight * gradient, mask=exists)
    if between.high != between.low:
        high = rows + (between.high.to(tl.int64) * channels + channel)
        tl.store(high, tl.load(high, mask=exists, other=0.0) + between.high_weight * gradient, mask=exists)
    tl.debug_barrier()  # other threads may read what these have stored


@triton.jit(do_not_specialize=["layout", "counts", "slice_tokens"])
def sum_kernel(
    grad_output,
    sums,
    strides,
    layout,
    counts,
    channels,
    slice_tokens,
    SPATIAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of the tables from one slice of the tokens: fp32 `sums[slice]`, `[n + m + m' + BLOCK_W, channels]`,
    of which the last rows are scratch. Reads the slice once, dense or packed.

    A video, or sample, after the other, and in it up to `BLOCK_W` columns of patches: they are added up in registers
    over all rows, a row over its columns for the height, and those sums over a frame for the time.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    zero = number * 0
    temporal_count, height_count, width_count = zero + counts[0], zero + counts[1], zero + counts[2]
    anchors = temporal_count + height_count + width_count
    temporal = sums + number * (anchors + BLOCK_W) * channels
    height = temporal + temporal_count * channels
    width = height + height_count * channels
    scratch = temporal + anchors * channels

    column = tl.arange(0, BLOCK_W)
    for start in range(0, anchors, BLOCK_W):
        row = start + column
        zeros = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        mask = (row < anchors)[:, None] & exists[None, :]
        tl.store(temporal + (row[:, None] * channels + channel[None, :]), zeros, mask=mask)
    tl.debug_barrier()  # other threads will read what these have stored

    slice_start = number * slice_tokens
    slice_end = tl.minimum(slice_start + slice_tokens, layout.tokens)
    last_video = _first_video(layout, tl.maximum(slice_end - 1, 0))
    for step in range(_first_video(layout, slice_start), tl.minimum(last_video + 1, zero + layout.videos)):
        video = tl.cast(step, tl.int64)
        first, end, size_t, size_h, size_w, origin, frame_stride, row_stride = _load_video(layout, video, strides)
        # The part of the video in this slice, and the rows of patches it touches, counted through all frames.
        begin = tl.maximum(slice_start - first, 0)
        end = tl.minimum(slice_end, end) - first
        some_h, some_w = tl.maximum(size_h, 1), tl.maximum(size_w, 1)
        first_row = begin // some_w
        end_row = tl.where(begin < end, (end + (some_w - 1)) // some_w, first_row)
        single = end_row == first_row + 1  # then only these columns are in this slice
        first_w = tl.where(single, begin - first_row * some_w, 0)
        end_w = tl.where(single, end - first_row * some_w, tl.where(begin < end, size_w, 0))
        for start in range(first_w, end_w, BLOCK_W):
            first_column = tl.cast(start, tl.int64)
            offsets = ((first_column + column) * strides[3])[:, None] + (channel * strides[4])[None, :]
            column_sums = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            for frame in range(first_row // some_h, (end_row + (some_h - 1)) // some_h):
                t = tl.cast(frame, tl.int64)
                frame_sum = tl.zeros([BLOCK_C], tl.float32)
                rows_before = t * some_h
                for row in range(tl.maximum(first_row - rows_before, 0), tl.minimum(end_row - rows_before, some_h)):
                    h = tl.cast(row, tl.int64)
                    before = (rows_before + h) * some_w + first_column
                    after = tl.minimum(end - before, end_w - first_column)
                    here = grad_output + (origin + t * frame_stride + h * row_stride + offsets)
                    mask = _within(column, begin - before, after, BLOCK_W)[:, None] & exists[None, :]
                    gradient = tl.load(here, mask=mask, other=0.0).to(tl.float32)
                    column_sums += gradient
                    row_sum = tl.sum(gradient, 0)
                    frame_sum += row_sum
                    if not WIDE:
                        h = h.to(tl.int32)  # 64-bit divisions are slow
                    _add_to(height, patch_between(h, size_h, height_count, SPATIAL), row_sum, channel, channels, exists)
                between = patch_between(t, size_t, temporal_count, "ends")
                _add_to(temporal, between, frame_sum, channel, channels, exists)
            here = scratch + (column.to(tl.int64)[:, None] * channels + channel[None, :])
            tl.store(here, column_sums, mask=exists[None, :])
            tl.debug_barrier()
            for i in range(start, tl.minimum(start + BLOCK_W, end_w)):
                column_sum = tl.load(scratch + ((i - start) * channels + channel), mask=exists, other=0.0)
                between = patch_between(tl.cast(i, tl.int64), size_w, width_count, SPATIAL)
                _add_to(width, between, column_sum, channel, channels, exists)


@triton.jit(do_not_specialize=["counts", "slices", "slice_rows"])
def add_slices_kernel(sums, temporal, height, width, counts, channels, slices, slice_rows, BLOCK_C: tl.constexpr):
    """Adds up `sums` `[slices, slice_rows, channels]` slice by slice, into the contiguous gradients of the tables. A
    program takes one row, or a part of it."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    row = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    total = tl.zeros([BLOCK_C], tl.float32)
    for number in range(slices):
        here = (tl.cast(number, tl.int64) * slice_rows + row) * channels + channel
        total += tl.load(sums + here, mask=exists, other=0.0)
    result = total.to(temporal.dtype.element_ty)
    if row < counts[0]:
        tl.store(temporal + (row * channels + channel), result, mask=exists)
    elif row < counts[0] + counts[1]:
        tl.store(height + ((row - counts[0]) * channels + channel), result, mask=exists)
    elif row < counts[0] + counts[1] + counts[2]:
        tl.store(width + ((row - counts[0] - counts[1]) * channels + channel), result, mask=exists)
