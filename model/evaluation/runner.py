"""Asking about the samples of a benchmark, in one process or several, from where an earlier run ended."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from .predictions import Prediction, PredictionFileError, PredictionWriter, read_predictions, replace_file
from .samples import Sample


class Predictor(Protocol):
    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        """One prediction per sample, in order."""


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: this one's number.
        count: how many there are.
        device: this one's.
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that `accelerate launch` started, this one among them; or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device="cuda" if torch.cuda.is_available() else "cpu")
        return
    from ..processes import patient_processes

    state = patient_processes()  # the first to be done waits for the last
    try:
        yield Processes(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)
    finally:
        state.destroy_process_group()


def predict_all(
    samples: Sequence[Sample],
    predictor: Predictor,
    out: Path,
    *,
    batch_size: int = 1,
    retry_errors: bool = False,
    settings: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    write: Callable[[int, bytes], int] = os.write,
) -> None:
    """Adds a prediction for each sample that has none to a file.

    May be killed at any moment and called again, with another number of processes too: each sample then has one
    prediction, as if nothing had happened. One process writes to the file itself. Several write to a file of their own
    each, `NAME.RANK-of-COUNT.jsonl`, whose lines the first one moves to `out` before and after; none reads the file of
    a process that runs.

    Args:
        samples: the same ones in all processes.
        predictor: whose errors end the run. What is wrong with a sample's media belongs into its prediction.
        out: the file, and the place for those of several processes.
        batch_size: how many samples it gets at a time.
        retry_errors: samples whose media were missing or could not be decoded are asked about again.
        settings: what predictions depend on, kept beside `out` in `NAME.run.json`.
        processes: those that share the work; by default this one alone.
        write: see `PredictionWriter`.

    Raises:
        FileInUseError: another run is writing to the file.
        PredictionFileError: the file's predictions are of other settings or of other samples.
    """
    processes = processes or Processes()
    with _main_file(out, write, settings, retry_errors) if processes.rank == 0 else nullcontext() as main:
        processes.wait()
        rest = _without_prediction(samples, read_predictions(out), out)
        # Neighbours stay together: they often are about the same video.
        first, last = (len(rest) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
        share = rest[first:last]
        if processes.count == 1:
            _predict(share, predictor, main, batch_size, quiet=False)
            return
        part = out.with_name(f"{out.stem}.{processes.rank}-of-{processes.count}.jsonl")
        with PredictionWriter(part, write) as writer:
            _predict(share, predictor, writer, batch_size, quiet=main is None)
        processes.wait()
        if main is not None:
            _move_parts(main)


@contextmanager
def _main_file(
    out: Path, write: Callable[[int, bytes], int], settings: Mapping[str, Any] | None, retry_errors: bool
) -> Iterator[PredictionWriter]:
    """The file with all predictions of earlier runs."""
    with PredictionWriter(out, write) as main:
        if settings is not None:
            check_settings(out, settings)
        _move_parts(main)
        if retry_errors:
            main.keep(lambda prediction: prediction.error is None)
        yield main


def _move_parts(main: PredictionWriter) -> None:
    """Moves what several processes have written, each to its own file, to the main one.

    Killed between the two steps of a move, the next one finds the predictions in both files.
    """
    done = {prediction.index for prediction in read_predictions(main.path)}
    name = re.compile(re.escape(main.path.stem) + r"\.\d+-of-\d+\.jsonl")
    for part in sorted(file for file in main.path.parent.iterdir() if name.fullmatch(file.name)):
        with PredictionWriter(part):  # no one is writing to it
            new = [prediction for prediction in read_predictions(part) if prediction.index not in done]
            main.add(*new)
            part.unlink()
        done.update(prediction.index for prediction in new)


def _without_prediction(samples: Sequence[Sample], predictions: Sequence[Prediction], out: Path) -> list[Sample]:
    ids = {prediction.index: prediction.id for prediction in predictions}
    for sample in samples:
        if ids.get(sample.index, sample.id) != sample.id:
            raise PredictionFileError(
                f"{out}: expected predictions of these samples, got {ids[sample.index]!r} for {sample.id!r}; give "
                "another file or remove this one"
            )
    return [sample for sample in samples if sample.index not in ids]


def _predict(
    samples: Sequence[Sample], predictor: Predictor, writer: PredictionWriter, batch_size: int, quiet: bool
) -> None:
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    for batch in tqdm(batches, unit="batch", disable=True if quiet else None):
        for sample, prediction in zip(batch, predictor.predict(batch), strict=True):
            if (prediction.index, prediction.id) != (sample.index, sample.id):
                raise ValueError(f"predictor: expected a prediction of {sample.id!r}, got one of {prediction.id!r}")
            writer.add(prediction)


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Keeps the settings that predictions are made with beside them; ValueError where there are others already."""
    file = out.with_suffix(".run.json")
    if not file.exists():
        replace_file(file, json.dumps(settings, indent=2).encode() + b"\n")
        return
    found = json.loads(file.read_bytes())
    changed = [
        f"{name} was {found.get(name)!r}, now {value!r}" for name, value in settings.items() if found.get(name) != value
    ]
    if changed:
        raise PredictionFileError(
            f"{out}: holds predictions of other settings: {'; '.join(changed)}; give another file or remove this one "
            f"and {file.name}"
        )
