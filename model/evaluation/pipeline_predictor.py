"""Predictions by a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..answer import Answer
from ..image import load_image
from ..media import Media
from ..pipeline import EncodedVideo, LlavaStPipeline
from ..tasks import TASKS
from ..video import load_video
from .predictions import MediaError, Prediction
from .samples import Sample


class PipelinePredictor:
    """Asks a model.

    Args:
        pipeline: the model and its processor.
        folder: where media are.
        options: of `LlavaStPipeline.ask_batch`.
    """

    def __init__(self, pipeline: LlavaStPipeline, folder: Path, **options: Any) -> None:
        self._pipeline, self._folder, self._options = pipeline, folder, options
        # What the last samples showed: the next ones often are about the same.
        self._shown: dict[tuple[Any, ...], EncodedVideo | MediaError] = {}

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Predictions of samples of one task. Media that cannot be shown are an error of their samples alone."""
        keys = [(TASKS[sample.task].media, sample.file(self._folder), sample.clip) for sample in samples]
        self._shown = {key: self._shown.get(key) or self._show(*key) for key in dict.fromkeys(keys)}
        shown = [self._shown[key] for key in keys]
        questions = [
            [
                {
                    "role": "user",
                    "unit": "fraction",
                    "content": [{"type": each.media.kind, each.media.kind: each}, *sample.prompt],
                }
            ]
            for sample, each in zip(samples, shown, strict=True)
            if isinstance(each, EncodedVideo)
        ]
        answers = iter(self._pipeline.ask_batch(questions, samples[0].task, **self._options))
        return [
            Prediction(sample.index, sample.id, error=each)
            if isinstance(each, MediaError)
            else _prediction(sample, each.media, next(answers))
            for sample, each in zip(samples, shown, strict=True)
        ]

    def _show(self, kind: str, file: Path, clip: tuple[int, int] | None) -> EncodedVideo | MediaError:
        config = self._pipeline.config
        size = config.vision_config.image_size
        try:
            loaded = load_image(file, size) if kind == "image" else load_video(file, config.num_frames, size, clip)
        except FileNotFoundError as error:
            return MediaError("missing", str(error))
        except (OSError, ValueError) as error:
            return MediaError("undecodable", str(error))
        return self._pipeline.encode_image(loaded) if kind == "image" else self._pipeline.encode_video(loaded)


def _prediction(sample: Sample, media: Media, answer: Answer) -> Prediction:
    said = answer.written
    return Prediction(
        sample.index, sample.id, said.text, said.positions, answer.finished, media=replace(media, source=None)
    )
