"""What is reported while a stage trains."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .losses import TaskLosses


class Meter:
    """Tokens, time spent waiting for data, memory, and losses by task, since the last report, in one process."""

    def __init__(self) -> None:
        self.tasks = TaskLosses()
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._tokens, self._waited = 0, 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Counts the tokens of a batch that are not padding."""
        mask = batch.get("attention_mask")
        self._tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())

    def drain(self) -> dict[str, Any]:
        """What this process has to report; begins anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        found = {
            "tokens": self._tokens,
            "seconds": seconds,
            "waiting": self._waited / seconds,
            "memory": memory_gb(),
            "tasks": self.tasks.drain(),
        }
        self._start()
        return found


def memory_gb() -> float:
    """The most memory that was in use so far, in GB: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def combine(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One report of all processes: tokens per second of all, the worst share of waiting, the most memory."""
    return {
        "tokens_per_second": sum(report["tokens"] / report["seconds"] for report in reports),
        "waiting_for_data": max(report["waiting"] for report in reports),
        "memory_gb": max(report["memory"] for report in reports),
    }


def plot(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws losses over steps, in all and by task, and evaluations. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 8), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True)
    names = sorted({name for entry in history for name in entry})
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
        if name == "loss" or name.startswith("loss/"):
            losses.plot(*zip(*points, strict=True), label=name, lw=2 if name == "loss" else 1)
        elif name.startswith("eval/"):
            scores.plot(*zip(*points, strict=True), "o-", label=name)
    losses.set_ylabel("loss")
    scores.set_ylabel("evaluation")
    scores.set_xlabel("step")
    for axes in (losses, scores):
        if axes.lines:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
