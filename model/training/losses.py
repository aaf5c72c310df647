"""The loss of a training step, whatever micro-batches and processes it is dealt out to, and each sample's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..modeling_llava_st import LlavaStForConditionalGeneration
from ..prompting.inputs import IGNORED


class StepLoss:
    """Computes the loss of a model's forward pass.

    Args:
        model: gets this as its loss.
        loss_samples: see `StageSettings`.

    Attributes:
        sums: float32 `[samples]`, of the losses of each sample's targets in the last forward pass.
        targets: int64 `[samples]`, how many each has.
    """

    def __init__(self, model: LlavaStForConditionalGeneration, loss_samples: float = 1.0) -> None:
        self.loss_samples = loss_samples
        self.sums = self.targets = torch.zeros(0)
        self._model = model
        self._per_sample = counts_samples(model)
        model._loss = self

    def __call__(
        self, hidden: Tensor, labels: Tensor, positions: Tensor | None, sample: Tensor | None, items: Tensor | None
    ) -> Tensor:
        losses = self._model.token_losses(hidden, labels, positions).flatten()
        sample = _samples(labels, sample)
        active = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten()
        number = int(sample.max()) + 1
        sums = losses.new_zeros(number).index_add(0, sample.flatten(), losses)
        targets = active.new_zeros(number, dtype=torch.int64).index_add(0, sample.flatten(), active.long())
        self.sums, self.targets = sums.detach(), targets
        if self._per_sample:
            items = (targets > 0).sum() if items is None else items
            loss = self.loss_samples * (sums / targets.clamp(min=1)).sum()
        else:
            items = targets.sum() if items is None else items
            loss = sums.sum()
        return loss / torch.as_tensor(items, device=loss.device).clamp(min=1) + 0 * self._vision()

    def _vision(self) -> Tensor | int:
        """A number that depends on all of the vision path's parameters.

        Added with weight 0, it gives those a gradient that this batch does not use, as other processes' batches may do:
        all of them exchange the same gradients then, and none waits for another.
        """
        parameters = [p for p in self._model.model.visual_tokenizer.parameters() if p.requires_grad]
        return sum(
            (p.flatten()[0].float() for p in parameters), self._model.lm_head.weight.new_zeros((), dtype=torch.float)
        )


def counts_samples(model: LlavaStForConditionalGeneration) -> bool:
    """Whether the loss is one over samples, as published, and not over targets."""
    return model.config.compat == "released" and model.config.lape


def count_items(batch: Mapping[str, Tensor], per_sample: bool) -> Tensor:
    """How many targets a batch has, or samples with any: what the sum of a step's losses is divided by."""
    active = batch["labels"][:, 1:] != IGNORED
    if not per_sample:
        return active.sum()
    sample = _samples(batch["labels"], batch.get("sample"))
    return sample.new_tensor(len(torch.unique(sample[:, :-1][active])))


class TaskLosses:
    """Mean loss over the targets of each task, since the last report."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def add(self, tasks: Sequence[str], sums: Tensor, targets: Tensor) -> None:
        for task, total, count in zip(tasks, sums.tolist(), targets.tolist(), strict=False):
            entry = self._totals.setdefault(task, [0.0, 0.0])
            entry[0] += total
            entry[1] += count

    def drain(self) -> dict[str, list[float]]:
        """task -> sum of losses, number of targets."""
        totals, self._totals = self._totals, {}
        return totals


def merge_totals(several: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Mean losses from the totals of all processes."""
    merged: dict[str, list[float]] = {}
    for totals in several:
        for task, (total, count) in totals.items():
            entry = merged.setdefault(task, [0.0, 0.0])
            entry[0] += total
            entry[1] += count
    return {task: total / max(count, 1) for task, (total, count) in sorted(merged.items())}


def _samples(labels: Tensor, sample: Tensor | None) -> Tensor:
    """`[B, L]`: which sample a token belongs to."""
    if sample is not None:
        return sample
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
