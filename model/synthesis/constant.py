"""What an answer scores that is the same for every clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.metrics import EventTruth
from ..geometry import Box, TimeSpan

# Parts of the clip and of the picture. The first step of each search tries them all, later ones go on from the best.
_TIMES = np.linspace(0, 1, 41)
_CENTRES = np.linspace(0.1, 0.9, 9)
_SIDES = np.linspace(0.15, 0.65, 6)
_FINEST = 0.002


@dataclass(frozen=True)
class ConstantAnswer:
    """The best answer to give to every question of a benchmark without looking.

    Attributes:
        span: the best one, in fractions.
        box: the best one, in fractions, given for the whole clip.
        m_tiou: mean temporal IoU of the span, from 0 to 1.
        m_siou: mean spatial IoU of the box, from 0 to 1.
    """

    span: TimeSpan
    box: Box
    m_tiou: float
    m_siou: float


def constant_answer(truths: Sequence[EventTruth]) -> ConstantAnswer:
    """The span and the box with the highest mean IoUs, as `evaluation.metrics` defines these, found by search.

    They are chosen on the truths themselves, each for its own score, and so score more than any model that gives one
    answer to everything. A box for the whole clip meets every frame of the truth: m_sIoU does not count the others.
    """
    if not truths:
        raise ValueError("truths: expected one at least, got none")
    spans = np.array([(truth.span.start, truth.span.end) for truth in truths])
    boxes, weights = [], []
    for truth in truths:
        tube = truth.tube.tube()
        boxes += [(box.left, box.top, box.right, box.bottom) for box in tube.boxes]
        weights += [1 / len(tube.boxes) / len(truths)] * len(tube.boxes)
    edges, shares = np.array(boxes), np.array(weights)

    starts, ends = (grid.ravel() for grid in np.meshgrid(_TIMES, _TIMES))
    candidates = np.stack([starts, ends], axis=1)[starts < ends]
    span, m_tiou = _search(candidates, lambda tried: _ious(tried, spans).mean(axis=1), step=_TIMES[1])

    grids = np.meshgrid(_CENTRES, _CENTRES, _SIDES, _SIDES)
    x, y, width, height = (grid.ravel() for grid in grids)
    candidates = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    box, m_siou = _search(candidates, lambda tried: _ious(tried, edges) @ shares, step=0.1)
    return ConstantAnswer(TimeSpan(*span.tolist()), Box(*box.tolist()), m_tiou, m_siou)


def _search(candidates: np.ndarray, score: Callable[[np.ndarray], np.ndarray], step: float) -> tuple[np.ndarray, float]:
    """The best of the candidates `[N, coordinates]`, then moved by ever smaller steps while that helps."""
    candidates = np.clip(candidates, 0, 1)
    scores = np.concatenate([score(part) for part in np.array_split(candidates, max(len(candidates) // 64, 1))])
    best, highest = candidates[scores.argmax()], float(scores.max())
    directions = np.stack(np.meshgrid(*[(-1, 0, 1)] * candidates.shape[1]), axis=-1).reshape(-1, candidates.shape[1])
    while step > _FINEST:
        tried = np.clip(best + step * directions, 0, 1)
        scores = score(tried)
        if scores.max() > highest:
            best, highest = tried[scores.argmax()], float(scores.max())
        else:
            step /= 2
    return best, highest


def _ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of intervals (start, end) or boxes (left, top, right, bottom): `[len(a), len(b)]`."""
    axes = a.shape[1] // 2
    low = np.maximum(a[:, None, :axes], b[None, :, :axes])
    high = np.minimum(a[:, None, axes:], b[None, :, axes:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    size_a, size_b = (np.clip(each[:, axes:] - each[:, :axes], 0, None).prod(axis=1) for each in (a, b))
    return common / np.maximum(size_a[:, None] + size_b[None, :] - common, 1e-12)
