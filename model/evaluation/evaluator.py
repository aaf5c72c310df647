"""Scores of a model that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..modeling_llava_st import LlavaStForConditionalGeneration
from ..pipeline import LlavaStPipeline
from ..processing_llava_st import LlavaStProcessor
from .datasets import read_dataset
from .pipeline_predictor import PipelinePredictor
from .predictions import Prediction
from .samples import Sample
from .scoring import score


class Evaluator:
    """Asks a model about benchmarks: what `run_stage` takes as `evaluate`.

    Every process asks about all samples: where parameters are sharded none can answer alone.

    Args:
        benchmarks: task -> its file of annotations, see `read_dataset`.
        media: the folder of their videos and images.
        limit: only the first so many records of each file; None: all.
        batch_size: questions at a time.
        options: of `LlavaStPipeline.ask_batch`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a task is not known, or its file has no usable records among the first `limit`.
    """

    def __init__(
        self,
        benchmarks: Mapping[str, str | PathLike[str]],
        media: str | PathLike[str],
        limit: int | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        self._media, self._limit, self._batch_size, self._options = Path(media), limit, batch_size, options
        self._datasets = {task: read_dataset(task, Path(file)) for task, file in benchmarks.items()}
        for task, dataset in self._datasets.items():
            if not dataset.first(limit):
                raise ValueError(f"{benchmarks[task]}: has no usable records")

    def __call__(
        self, model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, step: int
    ) -> dict[str, float]:
        """`"TASK SCORE"` -> a score in percent, as `llava_st.evaluate` reports it."""
        pipeline, found = LlavaStPipeline(model, processor), {}
        for task, dataset in self._datasets.items():
            asked = dataset.first(self._limit)
            predictions = predict(pipeline, self._media, asked, self._batch_size, **self._options)
            scores = score(dataset, predictions, limit=self._limit)["scores"]
            found |= {f"{task} {name}": value for name, value in scores.items()}
        return found


def predict(
    pipeline: LlavaStPipeline, media: Path, samples: Sequence[Sample], batch_size: int = 1, **options: Any
) -> list[Prediction]:
    """A model's answers to samples of one task.

    Args:
        media: where videos and images are.
        batch_size: questions at a time.
        options: of `LlavaStPipeline.ask_batch`.
    """
    predictor = PipelinePredictor(pipeline, media, **options)
    batches = (samples[i : i + batch_size] for i in range(0, len(samples), batch_size))
    return [prediction for batch in batches for prediction in predictor.predict(batch)]
