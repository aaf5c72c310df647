"""Linear layer and cross entropy over a vocabulary and three tables of anchors, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .lape import (
    AXES,
    INTEGERS,
    anchors_around,
    blend,
    check_coordinates,
    check_table,
    check_tensor,
    computing_dtype,
    reject,
)

REDUCTIONS = ("none", "mean", "sum", "per_sample_mean", "per_sample_sum")


def _targets(
    labels: Tensor, axis: Tensor, positions: Tensor, vocabulary: int, tables: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The two classes of each token, and the weight of the second: a label is both of its classes, with weight 0."""
    low, high, ratio = labels.long(), labels.long(), torch.zeros_like(positions)
    first = vocabulary
    for number, table in enumerate(tables):
        here = axis == number
        below, above, between = anchors_around(positions[here], len(table))
        low = low.index_put((here,), first + below)
        high = high.index_put((here,), first + above)
        ratio = ratio.index_put((here,), between)
        first += len(table)
    return low, high, ratio


def _divide(op: str, total: Tensor, normalizer: float | Tensor) -> Tensor:
    number = float(normalizer)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{op}: normalizer must be a positive number, got {number}")
    return total / number


def coordinate_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    sample: Tensor | None = None,
) -> Tensor:
    """The loss of N tokens whose labels are words, or fractional positions on an axis.

    hidden `[N, C]`, weight `[V, C]`, tables `[n, C]`, `[m, C]`, `[m', C]`, labels `[N]` int, already shifted, axis
    `[N]` int8 and positions `[N]` float64, of the labels (see the top of lape.py), sample `[N]` int. The classes are V
    words, then n anchors of temporal, m of height and m' of width. Of each token the first that applies counts:
    1. label = ignore_index: nothing; the token is not active.
    2. axis >= 0: the class of anchor f with weight 1 - r and that of anchor g with weight r, of that axis (f, g and r
       as in `interpolate_rows`). The label is not read; the class of the template token gets no weight.
    3. The class of its label, which may be a single anchor as well.
    A token loses `logsumexp(z) - (1 - r) z[a] - r z[b]`, in float32 (float64 for float64 hidden), to which all inputs
    are converted; so is the result, whatever the dtype of hidden. Gradients have the dtypes of their inputs.

    Reductions, each of which gives 0, with zero gradients, where no token is active:
    - "none": `[N]`, 0 for tokens that are not active.
    - "mean": over active tokens. With `normalizer`, a positive number or 0-dim tensor without gradient, the sum over
      it: of all the active tokens that a step of gradient accumulation sees, in place of those of this call
      (`num_items_in_batch` of transformers). No other reduction takes one; where no token is active it is not read.
    - "sum": over active tokens.
    - "per_sample_sum": over samples, of the means over each one's active tokens, as published. `sample` tells which
      sample a token belongs to: numbers from 0, in any order. One without active tokens counts as 0.
    - "per_sample_mean": the same by the number of samples, `sample.max() + 1`, those without active tokens included.

    A ValueError names what does not fit; a token, by its number among the N.
    """
    op = "coordinate_cross_entropy"
    tables = (temporal, height, width)
    check_tensor(op, "hidden", hidden, ("N", "C"))
    tokens, channels = hidden.shape
    check_tensor(op, "weight", weight, ("V", channels))
    for name, table in zip(AXES, tables, strict=True):
        check_table(op, name, table, channels)
    check_tensor(op, "labels", labels, (tokens,), INTEGERS)
    check_tensor(op, "axis", axis, (tokens,), (torch.int8,))
    check_tensor(op, "positions", positions, (tokens,), (torch.float64,))
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'{op}: normalizer goes with reduction "mean" only, got "{reduction}"')
    if isinstance(normalizer, Tensor) and normalizer.dim():
        raise ValueError(f"{op}: normalizer must be a number or a 0-dim tensor, got shape {list(normalizer.shape)}")

    active = labels != ignore_index
    check_coordinates(op, axis, positions, read=active)
    classes = len(weight) + sum(map(len, tables))
    wrong = active & (axis < 0) & ((labels < 0) | (labels >= classes))
    reject(op, "labels", labels, wrong, f"be {ignore_index} or in [0, {classes})")

    wide = computing_dtype(hidden.dtype)
    low, high, ratio = _targets(labels[active], axis[active], positions[active], len(weight), tables)
    rows = hidden[active].to(wide)
    logits = torch.cat([rows @ source.to(wide).T for source in (weight, *tables)], 1)
    target = blend(logits.gather(1, low[:, None]), logits.gather(1, high[:, None]), ratio[:, None])
    losses = logits.logsumexp(1) - target.squeeze(1)

    if reduction == "none":
        return losses.new_zeros(tokens).index_put((active,), losses)
    if reduction in ("mean", "sum"):
        total = losses.sum()
        if reduction == "sum" or not len(losses):
            return total
        return _divide(op, total, len(losses) if normalizer is None else normalizer)
    if sample is None:
        raise ValueError(f'{op}: reduction "{reduction}" needs sample')
    check_tensor(op, "sample", sample, (tokens,), INTEGERS)
    reject(op, "sample", sample, sample < 0, "not be negative")
    samples = int(sample.max()) + 1 if tokens else 0
    of_each = losses.new_zeros(samples).index_add(0, sample[active], losses)
    total = (of_each / sample[active].bincount(minlength=samples).clamp(min=1)).sum()
    return total if reduction == "per_sample_sum" else total / max(samples, 1)
