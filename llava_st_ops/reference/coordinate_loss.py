"""Linear layer and cross entropy over a vocabulary and three tables of anchors, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def targets_of(
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


def check_loss(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    tables: Sequence[Tensor],
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
) -> None:
    """Shapes and dtypes: hidden `[..., C]` and token tensors `[...]`, of any number of dimensions."""
    channels = hidden.shape[-1]
    check_tensor(op, "hidden", hidden, hidden.shape)
    check_tensor(op, "weight", weight, ("V", channels))
    for name, table in zip(AXES, tables, strict=True):
        check_table(op, name, table, channels)
    check_tensor(op, "labels", labels, hidden.shape[:-1], INTEGERS)
    check_tensor(op, "axis", axis, labels.shape, (torch.int8,))
    check_tensor(op, "positions", positions, labels.shape, (torch.float64,))


def check_labels(op: str, classes: int, labels: Tensor, axis: Tensor, positions: Tensor, ignore_index: int) -> None:
    """That what counts of each token exists, of so many classes."""
    active = labels != ignore_index
    check_coordinates(op, axis, positions, read=active)
    wrong = active & (axis < 0) & ((labels < 0) | (labels >= classes))
    reject(op, "labels", labels, wrong, f"be {ignore_index} or in [0, {classes})")


def check_reduction(op: str, reduction: str, normalizer: float | Tensor | None, active: Tensor) -> None:
    """What lies on a device is not waited for. Where no token is active the normalizer does not matter."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'{op}: normalizer goes with reduction "mean" only, got "{reduction}"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"{op}: normalizer must be a number or a 0-dim tensor, got shape {list(normalizer.shape)}")
        if normalizer.device.type != "cpu" or torch.compiler.is_compiling():
            return
    if active.device.type == "cpu" and not torch.compiler.is_compiling() and not active.any():
        return
    number = float(normalizer)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{op}: normalizer must be a positive number, got {number}")


def check_sample(op: str, reduction: str, sample: Tensor | None, tokens: int) -> int:
    """How many samples there are, where the reduction asks for them. Reads `sample` back to the host."""
    if not reduction.startswith("per_sample"):
        return 0
    if sample is None:
        raise ValueError(f'{op}: reduction "{reduction}" needs sample')
    check_tensor(op, "sample", sample, (tokens,), INTEGERS)
    reject(op, "sample", sample, sample < 0, "not be negative")
    return int(sample.max()) + 1 if tokens else 0


def reduce_losses(
    losses: Tensor,
    active: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    sample: Tensor | None,
    samples: int,
) -> Tensor:
    """losses `[N]`, 0 where not active, to what `reduction` names; `sample` are numbers below `samples`. Waits for no
    device, and gives the same bits in every run."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        count = active.sum() if normalizer is None else torch.as_tensor(normalizer, device=losses.device)
        return losses.sum() / torch.where(active.any(), count, 1)
    of_each = losses.new_zeros(samples).index_put((sample,), losses, accumulate=True)
    counts = torch.zeros_like(of_each).index_put((sample,), active.to(of_each.dtype), accumulate=True)
    total = (of_each / counts.clamp(min=1)).sum()
    return total if reduction == "per_sample_sum" else total / max(samples, 1)


def coordinate_losses(
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """What each of N tokens loses, `[N]`, and the logsumexp of its logits, `[N]` and detached; 0 for tokens that are
    not active. Arguments as for `coordinate_cross_entropy`, which checks them."""
    tables = (temporal, height, width)
    active = labels != ignore_index
    wide = computing_dtype(hidden.dtype)
    low, high, ratio = targets_of(labels[active], axis[active], positions[active], len(weight), tables)
    rows = hidden[active].to(wide)
    logits = torch.cat([rows @ source.to(wide).T for source in (weight, *tables)], 1)
    target = blend(logits.gather(1, low[:, None]), logits.gather(1, high[:, None]), ratio[:, None])
    logsumexp = logits.logsumexp(1)
    losses, sums = (
        logits.new_zeros(len(labels)).index_put((active,), of_active)
        for of_active in (logsumexp - target.squeeze(1), logsumexp.detach())
    )
    return losses, sums


def coordinate_losses_backward(
    grad_losses: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    ignore_index: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_tables: bool,
) -> tuple[Tensor, ...]:
    """The gradients of hidden, weight and the tables; an empty tensor for each that is not wanted."""
    sources = (hidden, weight, temporal, height, width)
    with torch.enable_grad():
        leaves = [source.detach().requires_grad_() for source in sources]
        losses, _ = coordinate_losses(*leaves, labels, axis, positions, ignore_index)
        grads = torch.autograd.grad(losses, leaves, grad_losses)
    wanted = (grad_hidden, grad_weight, grad_tables, grad_tables, grad_tables)
    return tuple(grad if want else grad.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


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
    check_loss(op, hidden, weight, tables, labels, axis, positions)
    active = labels != ignore_index
    check_reduction(op, reduction, normalizer, active)
    check_labels(op, len(weight) + sum(map(len, tables)), labels, axis, positions, ignore_index)
    samples = check_sample(op, reduction, sample, len(labels))
    losses, _ = coordinate_losses(hidden, weight, *tables, labels, axis, positions, ignore_index)
    return reduce_losses(losses, active, reduction, normalizer, sample, samples)
