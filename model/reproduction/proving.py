"""Does a model look, and does it listen? New clips, other clips' frames, and questions about another object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.datasets import read_dataset
from ..evaluation.evaluator import predict
from ..evaluation.metrics import tube_iou
from ..evaluation.predictions import Prediction
from ..evaluation.records import Dataset
from ..evaluation.scoring import score
from ..geometry import Tube
from ..pipeline import LlavaStPipeline
from ..synthesis import Scene, benchmarks, constant_answer, event_truth, make_scene, synthesize

_SIZE = 96
BATCH = 20  # questions at a time
# A tube of the longest span: 12 frames of 12 tokens, and what is before them.
LONGEST_ANSWER = 200
_SCORES = {"m_tiou": "m_tIoU", "m_siou": "m_sIoU", "m_viou": "m_vIoU"}

Scores = dict[str, float]


def prove(pipeline: LlavaStPipeline, folder: Path, seed: int, clips: int) -> dict[str, Any]:
    """Asks when and where an object of each of so many held-out clips moves (STVG); scores from 0 to 1.

    Args:
        folder: gets the clips.
        seed: of the clips.

    Returns:
        `constant`: what the best answer scores that is the same for all clips. `a`: the model. `b`: the model, shown
        another clip than is asked about. Each has `m_tiou`, `m_siou` and `m_viou`. `c`: the model, asked about another
        object of the same clip: mean IoU of its tube with that of the object asked about (`new`) and with that of `a`'s
        (`old`): m_vIoU.
    """
    if clips < 2:
        raise ValueError(f"clips: expected 2 at least, to show another, got {clips}")
    synthesize(folder, clips, seed, split="held-out", size=_SIZE)
    scenes = [make_scene(seed, "held-out", clip) for clip in range(clips)]
    asked = read_dataset("stvg", folder / "benchmark" / "stvg.json")
    samples = asked.samples
    swapped = [replace(each, media=other.media) for each, other in zip(samples, samples[1:] + samples[:1], strict=True)]
    others = _about_others(folder, scenes)
    about_others, own, of_swapped = (
        predict(pipeline, folder, each, BATCH, max_new_tokens=LONGEST_ANSWER)
        for each in (others.samples, samples, swapped)
    )
    return {
        "constant": _constant_scores(scenes),
        "a": _scores(asked, own),
        "b": _scores(asked, of_swapped),
        "c": {"new": _scores(others, about_others)["m_viou"], "old": _scores(asked, about_others)["m_viou"]},
    }


def _about_others(folder: Path, scenes: Sequence[Scene]) -> Dataset:
    """Questions about another object of each scene than the benchmark's."""
    path = folder / "other.json"
    path.write_text(json.dumps(benchmarks(scenes, _SIZE, lambda scene: scene.other)["stvg"]))
    return read_dataset("stvg", path)


def _scores(dataset: Dataset, predictions: Sequence[Prediction]) -> Scores:
    found = score(dataset, predictions)["scores"]
    return {name: found[key] / 100 for name, key in _SCORES.items()}


def _constant_scores(scenes: Sequence[Scene]) -> Scores:
    """Of the best span and the best box together."""
    truths = [event_truth(scene, scene.asked) for scene in scenes]
    best = constant_answer(truths)
    times = [scenes[0].fraction(frame) for frame in range(scenes[0].frames)]
    inside = tuple(time for time in times if best.span.start <= time <= best.span.end)
    tube = Tube(inside, (best.box,) * len(inside))
    m_viou = sum(tube_iou(tube, truth.tube)[1] for truth in truths) / len(truths)
    return {"m_tiou": best.m_tiou, "m_siou": best.m_siou, "m_viou": m_viou}
