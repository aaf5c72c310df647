"""Where rows of a resized table, and coordinates in text, lie among a table's anchors, inside Triton kernels.

As csrc/geometry/anchors.h has it: patches in fractions of integers, coordinates in float64.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Between(NamedTuple):
    """Between two anchors: scalars or tensors, which broadcast with each other. Where `low` and `high` are the same,
    the weights are 1 and 0."""

    low: Any
    high: Any
    low_weight: Any  # fp32
    high_weight: Any


@triton.jit
def patch_between(i, size, count, ALIGNMENT: tl.constexpr):
    """Patch `i`, in [0, size), of `size` patches over `count` anchors.

    It sits at anchor, by ALIGNMENT, (count - 1) i / (size - 1), the only one at 0 ("ends"), (i + 1/2) count / size -
    1/2, clamped ("centers"), or (count - 1) (i + 1/2) / size ("text"). `2 * size * count` must fit the type of `i`.
    """
    size, count = tl.cast(size, i.dtype), tl.cast(count, i.dtype)
    if ALIGNMENT == "ends":
        numerator = i * (count - 1)
        denominator = tl.maximum(size - 1, 1)
    else:
        denominator = tl.maximum(size, 1) * 2  # kernels compute, and drop, the place of patches of empty videos too
        if ALIGNMENT == "text":
            numerator = (i * 2 + 1) * (count - 1)
        else:
            numerator = tl.minimum(tl.maximum((i * 2 + 1) * count - size, 0), (count - 1) * denominator)
    low = numerator // denominator
    rest = numerator - low * denominator
    divisor = denominator.to(tl.float32)
    return Between(
        low=low,
        high=low + (rest > 0).to(low.dtype),
        # Of integers, so that both weights are rounded once.
        low_weight=tl.div_rn((denominator - rest).to(tl.float32), divisor),
        high_weight=tl.div_rn(rest.to(tl.float32), divisor),
    )


@triton.jit
def coordinate_between(position, count):
    """A coordinate, float64: a fraction of the axis, clipped to [0, 1]. NaN counts as 0: callers look for it."""
    clipped = tl.where(position > 0, tl.minimum(position, 1.0), 0.0).to(tl.float64)
    anchor = clipped * tl.cast(count - 1, tl.float64)
    low = anchor.to(tl.int64)
    ratio = anchor - low.to(tl.float64)
    return Between(
        low=low,
        high=low + (ratio > 0).to(tl.int64),
        low_weight=(1.0 - ratio).to(tl.float32),
        high_weight=ratio.to(tl.float32),
    )


@triton.jit
def blend(between, low, high):
    """Of values at the two anchors. At an anchor it is that anchor's to the bit: infinity times 0 would be NaN."""
    return tl.where(between.low == between.high, low, between.low_weight * low + between.high_weight * high)


@triton.jit
def table_row(table, strides, between, channel, mask):
    """The interpolated row of a table, fp32. `between` must broadcast with `channel`, which is int64."""
    channel_offset = channel * strides[1]
    low = tl.load(table + (between.low.to(tl.int64) * strides[0] + channel_offset), mask=mask, other=0.0)
    high = tl.load(table + (between.high.to(tl.int64) * strides[0] + channel_offset), mask=mask, other=0.0)
    return blend(between, low.to(tl.float32), high.to(tl.float32))
