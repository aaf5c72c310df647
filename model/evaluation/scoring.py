"""Scores of predictions; no model, no media and no GPU are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llava_st_ops import __version__

from ..coordinate_text import CoordinateText, plain, read
from ..tasks import TASKS, AnswerError
from .captions import score_captions
from .metrics import MISSING, TASK_METRICS, elc_caption
from .predictions import Prediction
from .records import Dataset
from .samples import Sample, Truth

# What metrics count; the counts of a report are of all samples.
_COUNTS = ("samples", "unparsable", "missing")


def score(
    dataset: Dataset, predictions: Iterable[Prediction], metrics: str = "standard", limit: int | None = None
) -> dict[str, Any]:
    """A report: scores in percent, counts, and lists of all that went wrong; see docs/evaluation.md.

    Answers that cannot be parsed count as wrong, as do, in `"standard"`, samples whose media are missing or could not
    be decoded; in `"published"` the latter are left out. Samples without a prediction are left out of the scores, and
    the report is not `complete`.

    Args:
        dataset: what was asked about.
        predictions: of its samples, in any order.
        metrics: `"standard"` or `"published"`.
        limit: only the first so many records of the data file count.

    Returns:
        What `llava_st.evaluate` writes as JSON.

    Raises:
        ValueError: predictions are of other samples.
    """
    samples = dataset.first(limit)
    if not samples:
        raise ValueError("dataset: expected samples, found none")
    known = {prediction.index: prediction for prediction in predictions}
    pairs: list[tuple[Any, Truth]] = []
    listed: dict[str, list[dict[str, Any]]] = {"missing": [], "undecodable": [], "unparsable": []}
    unfinished = 0
    for sample in samples:
        prediction = known.get(sample.index)
        if prediction is None:
            continue
        if prediction.id != sample.id:
            raise ValueError(
                f"predictions: expected one of {sample.id!r}, got {prediction.id!r}; are they of other data?"
            )
        value = None
        if prediction.error is not None:
            listed[prediction.error.kind].append(_entry(sample, reason=prediction.error.message))
            value = MISSING if metrics == "published" else None
        else:
            unfinished += not prediction.finished
            said = CoordinateText(prediction.text, prediction.positions)
            try:
                value = TASKS[sample.task].parse(read(said).parts)
            except AnswerError as error:
                listed["unparsable"].append(_entry(sample, reason=str(error), answer=plain(said)))
        pairs.append((value, sample.truth_for(prediction.media)))

    scores, absent = _scores(samples[0].task, pairs, metrics)
    counts = {"samples": len(samples), "predicted": len(pairs)}
    counts |= {name: len(entries) for name, entries in listed.items()}
    return {
        "task": samples[0].task,
        "metrics": metrics,
        "version": __version__,
        "complete": len(pairs) == len(samples),
        "counts": {**counts, "unfinished": unfinished, "broken": len(dataset.broken)},
        "scores": scores,
        "absent": absent,
        **listed,
        "broken": list(dataset.broken),
        "notes": list(dataset.notes),
    }


def _entry(sample: Sample, **more: str) -> dict[str, Any]:
    return {"index": sample.index, "id": sample.id, **more}


def _scores(
    task: str, pairs: Sequence[tuple[Any, Truth]], metrics: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Scores by name, and the reason for each that could not be had."""
    found = TASK_METRICS[task](pairs, metrics=metrics)
    scores = {name: value for name, value in found.items() if name not in _COUNTS}
    absent = {name: "there are no samples to score" for name, value in scores.items() if value is None}
    if task == "elc":
        captions = [
            ("" if value is None else elc_caption(value.caption, metrics), truth.caption)
            for value, truth in pairs
            if value is not MISSING
        ]
        more, missing = score_captions(captions)
        scores, absent = scores | more, absent | missing
    return {name: value for name, value in scores.items() if value is not None}, absent
