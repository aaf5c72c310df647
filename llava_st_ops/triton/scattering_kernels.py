"""Triton kernels of lape_scatter and of its backward; `scattering.py` beside this file launches them.

A program writes a part of one row of a result, once. Everything is widened to fp32 when it is loaded.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .anchors import Between, coordinate_between, table_row


class Sources(NamedTuple):
    """Where rows come from: pointers, strides and numbers of rows."""

    embed: Any
    temporal: Any
    height: Any
    width: Any
    visual: Any
    strides: tuple[tuple[int, int], ...]
    counts: tuple[int, int, int, int, int]


class Tokens(NamedTuple):
    """What the tokens are: pointers `[N]` and their strides."""

    input_ids: Any
    axis: Any
    positions: Any
    visual_index: Any
    strides: tuple[int, int, int, int]


@triton.jit
def _row(source, strides, row, channel, mask):
    return tl.load(source + (row * strides[0] + channel * strides[1]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scatter_kernel(sources, tokens, output, channels, BLOCK_C: tl.constexpr):
    """`output` is contiguous. A token whose row does not exist gets NaN: nobody has checked indices on the device."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    visual_row = tl.load(tokens.visual_index + token * tokens.strides[3]).to(tl.int64)
    axis = tl.load(tokens.axis + token * tokens.strides[1]).to(tl.int32)
    position = tl.load(tokens.positions + token * tokens.strides[2])
    row = tl.load(tokens.input_ids + token * tokens.strides[0]).to(tl.int64)
    result = tl.full([BLOCK_C], float("nan"), tl.float32)
    if visual_row != -1:
        if (visual_row >= 0) & (visual_row < sources.counts[4]):
            result = _row(sources.visual, sources.strides[4], visual_row, channel, exists)
    elif (axis == -1) & (row >= 0) & (row < sources.counts[0]):
        result = _row(sources.embed, sources.strides[0], row, channel, exists)
    else:
        # A row of a table: at a position, or an anchor by its id.
        row -= sources.counts[0]
        first_height = sources.counts[1]
        first_width = first_height + sources.counts[2]
        by_id = axis == -1
        table = tl.where(by_id, (row >= first_height).to(tl.int32) + (row >= first_width).to(tl.int32), axis)
        count = tl.where(table == 0, sources.counts[1], tl.where(table == 1, sources.counts[2], sources.counts[3]))
        row -= tl.where(table == 0, 0, tl.where(table == 1, first_height, first_width))
        fits = tl.where(by_id, (row >= 0) & (row < count), (table >= 0) & (table < 3) & (position == position))
        place = coordinate_between(position, count)
        between = Between(
            low=tl.where(by_id, row, place.low),
            high=tl.where(by_id, row, place.high),
            low_weight=place.low_weight,
            high_weight=place.high_weight,
        )
        if fits & (table == 0):
            result = table_row(sources.temporal, sources.strides[1], between, channel, exists)
        elif fits & (table == 1):
            result = table_row(sources.height, sources.strides[2], between, channel, exists)
        elif fits:
            result = table_row(sources.width, sources.strides[3], between, channel, exists)
    tl.store(output + (token * channels + channel), result.to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first_row", "tokens"])
def gather_kernel(
    grad_output,
    bounds,
    token,
    share,
    gradient,
    strides,
    first_row,
    tokens,
    channels,
    ENTRIES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The contiguous gradient of one source, whose rows are destinations `first_row` and on. Entries `bounds[d]` to
    `bounds[d + 1]` have destination d: `ENTRIES` at once, in an order that depends on nothing but their number."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    bound = bounds + (first_row + row)
    start, end = tl.load(bound), tl.load(bound + 1)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, ENTRIES):
        entry = tl.cast(first, tl.int64) + tl.arange(0, ENTRIES)
        is_entry = entry < end
        source = tl.load(token + entry, mask=is_entry, other=0)
        weight = tl.load(share + entry, mask=is_entry, other=0.0).to(tl.float32)
        known = is_entry & (source >= 0) & (source < tokens)
        here = grad_output + ((source * strides[0])[:, None] + (channel * strides[1])[None, :])
        rows = tl.load(here, mask=known[:, None] & exists[None, :], other=0.0).to(tl.float32)
        # What is not there must not meet a share that is not finite, and a token that does not exist is to be noticed.
        missing = tl.where(is_entry & ~known, float("nan"), 0.0)[:, None]
        total += tl.sum(tl.where(known[:, None], rows * weight[:, None], missing), 0)
    tl.store(gradient + (row * channels + channel), total.to(gradient.dtype.element_ty), mask=exists)
