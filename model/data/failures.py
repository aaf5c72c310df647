"""Samples that cannot be trained on: reported, counted, and too many of them an error."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from os import PathLike

import torch
from torch.utils.data import get_worker_info

_logger = logging.getLogger(__name__)
# Processes that load data, the main one included.
_PROCESSES = 1024
# A share is not judged by fewer samples than this, unless a pass has fewer.
_ENOUGH = 1000


class TooManyFailuresError(RuntimeError):
    """A larger share of samples than allowed was skipped."""


@dataclass(frozen=True)
class SampleName:
    """Which sample it is.

    Attributes:
        index: in its training set.
        task: the name of its task.
        place: file and line.
    """

    index: int
    task: str
    place: str


@dataclass(frozen=True)
class SkippedSample(SampleName):
    """Comes in the place of a sample that cannot be trained on, and is left out of batches.

    Attributes:
        kind: `"record"`: not as published; `"media"`: its video or image cannot be read; `"prompt"`: the processor
            refused it; `"length"`: it is too long.
        reason: what was expected and what came.
        attempts: how often it was tried.
    """

    kind: str
    reason: str
    attempts: int = 1


class Failures:
    """Counts samples and those that were skipped, over the workers that load data for a process that trains. Each of
    several such processes judges its own samples.

    Args:
        max_share: which share may be skipped.
        size: samples of a pass. A share is that of the samples so far, or of `min(size, 1000)` while these are fewer.
        report: a file to which a line of JSON is added for each skipped sample.
    """

    def __init__(self, max_share: float = 0.01, size: int = _ENOUGH, report: str | PathLike[str] | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_failure_share: expected 0 to 1, got {max_share}")
        self.max_share, self.report = max_share, report
        self._enough = min(max(size, 1), _ENOUGH)
        # Samples and skipped ones. Each process has a row that it alone writes: no lock.
        self._counts = torch.zeros(_PROCESSES, 2, dtype=torch.int64).share_memory_()

    @property
    def seen(self) -> int:
        """How many samples were asked for."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """How many of them cannot be trained on."""
        return int(self._counts[:, 1].sum())

    def see(self) -> None:
        """A sample was asked for."""
        self._row()[0] += 1

    def add(self, skipped: SkippedSample) -> None:
        """A sample was skipped.

        Raises:
            TooManyFailuresError: they are too many now.
        """
        self._row()[1] += 1
        _logger.warning("%s: skipped after %d attempt(s), %s: %s", *_words(skipped))
        if self.report is not None:
            line = json.dumps(asdict(skipped)).encode() + b"\n"
            file = os.open(self.report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(file, line)  # at once, as other processes write to it, too
            finally:
                os.close(file)
        count, seen = self.skipped, self.seen
        if count > self.max_share * max(seen, self._enough):
            raise TooManyFailuresError(
                f"{count} of {seen} samples were skipped, more than max_failure_share={self.max_share:g} allows. The "
                f"last one is {skipped.place}: {skipped.reason}"
            )

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen, "skipped": self.skipped}

    def load_state_dict(self, *states: dict[str, int]) -> None:
        """Goes on from counts of an earlier run, of one process or of several."""
        self._counts.zero_()
        for state in states:
            self._row().add_(torch.tensor([state["seen"], state["skipped"]]))

    def _row(self) -> torch.Tensor:
        worker = get_worker_info()
        return self._counts[0 if worker is None else (worker.id + 1) % _PROCESSES]


def _words(skipped: SkippedSample) -> tuple[str, int, str, str]:
    return skipped.place, skipped.attempts, skipped.kind, skipped.reason
