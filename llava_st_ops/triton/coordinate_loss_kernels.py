"""Triton kernels of coordinate_cross_entropy and its backward, between whose matrix products `coordinate_loss.py`
beside this file launches them.

Logits are fp32 tiles `[tokens, classes]`, contiguous, of consecutive classes from `first` on, of V + n + m + m'.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .anchors import Between, blend, coordinate_between


class Targets(NamedTuple):
    """What the tokens of a tile should be: pointers and their strides, and the numbers of classes."""

    labels: Any
    axis: Any
    positions: Any
    strides: tuple[int, int, int]
    counts: tuple[int, int, int, int]
    ignore_index: int


@triton.jit
def _target(targets, token, mask):
    """Of one or several tokens, int64: the two classes and their weights, whether the token counts at all, and whether
    such classes exist."""
    label = tl.load(targets.labels + token * targets.strides[0], mask=mask, other=0).to(tl.int64)
    axis = tl.load(targets.axis + token * targets.strides[1], mask=mask, other=-1).to(tl.int32)
    position = tl.load(targets.positions + token * targets.strides[2], mask=mask, other=0.0)
    zero = label * 0
    first_height = zero + targets.counts[0] + targets.counts[1]
    first_width = first_height + targets.counts[2]
    classes = first_width + targets.counts[3]
    count = zero + tl.where(axis == 0, targets.counts[1], tl.where(axis == 1, targets.counts[2], targets.counts[3]))
    first = tl.where(axis == 0, zero + targets.counts[0], tl.where(axis == 1, first_height, first_width))
    place = coordinate_between(position, count)
    by_label = axis == -1
    between = Between(
        low=tl.where(by_label, label, first + place.low),
        high=tl.where(by_label, label, first + place.high),
        low_weight=tl.where(by_label, 1.0, place.low_weight),
        high_weight=tl.where(by_label, 0.0, place.high_weight),
    )
    exists = tl.where(by_label, (label >= 0) & (label < classes), (axis >= 0) & (axis < 3) & (position == position))
    return between, label != targets.ignore_index, exists


@triton.jit
def _finite(maximum):
    """What to subtract from logits before exp: nothing where that would be infinity minus infinity."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["targets", "first"])
def update_kernel(logits, maximum, total, low, high, targets, first, classes, BLOCK: tl.constexpr):
    """Of one token: the greatest logit so far, the sum of exponentials relative to it, and the logits of the two
    classes it should be, where they are in this tile."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * classes
    old = tl.load(maximum + token)
    new = old
    sums = tl.load(total + token)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row + column, mask=column < classes, other=float("-inf"))
        new = tl.maximum(old, tl.max(z, 0))
        shift = _finite(new)
        sums = sums * tl.exp(old - shift) + tl.sum(tl.exp(z - shift), 0)
        old = new
    tl.store(maximum + token, new)
    tl.store(total + token, sums)
    between, _, _ = _target(targets, token, True)
    here = between.low - first
    if (here >= 0) & (here < classes):
        tl.store(low + token, tl.load(row + here))
    here = between.high - first
    if (here >= 0) & (here < classes):
        tl.store(high + token, tl.load(row + here))


@triton.jit(do_not_specialize=["targets", "tokens"])
def losses_kernel(maximum, total, low, high, losses, logsumexp, targets, tokens, BLOCK: tl.constexpr):
    """A token that should be a class that does not exist loses NaN: nobody has checked labels on the device."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    total_here = tl.load(total + token, mask=mask, other=1.0)
    result = _finite(tl.load(maximum + token, mask=mask, other=0.0)) + tl.log(total_here)
    between, counts, exists = _target(targets, token, mask)
    known = mask & exists
    z_low = tl.load(low + token, mask=known, other=float("nan"))
    z_high = tl.load(high + token, mask=known, other=float("nan"))
    loss = result - blend(between, z_low, z_high)
    tl.store(losses + token, tl.where(counts, loss, 0.0), mask=mask)
    tl.store(logsumexp + token, tl.where(counts, result, 0.0), mask=mask)


@triton.jit(do_not_specialize=["targets", "first"])
def gradients_kernel(logits, logsumexp, grad_losses, gradients, targets, first, classes, BLOCK: tl.constexpr):
    """The gradients of a tile of logits, `gradients` like `logits`: softmax less what the token should be, times the
    gradient of its loss."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < classes
    z = tl.load(logits + (token * classes + column), mask=mask, other=0.0)
    between, counts, exists = _target(targets, token, True)
    number = first + column.to(tl.int64)
    # Where both classes are the same, the second has weight 0.
    wanted = tl.where(number == between.low, between.low_weight, 0.0)
    wanted += tl.where(number == between.high, between.high_weight, 0.0)
    gradient = (tl.exp(z - tl.load(logsumexp + token)) - wanted) * tl.load(grad_losses + token)
    gradient = tl.where(exists, gradient, float("nan"))
    gradient = tl.where(counts, gradient, 0.0)
    tl.store(gradients + (token * classes + column), gradient.to(gradients.dtype.element_ty), mask=mask)
