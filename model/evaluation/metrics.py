"""Scores of grounding answers: spans in time, boxes, and boxes that move. Plain functions on values.

A prediction is what a task's `parse` gives (fractions of the clip and of the picture), None where the answer could not
be parsed, and `MISSING` where the media could not be read, so that nothing was asked. Every function of a whole task
takes pairs of a prediction and its truth and returns percentages, None where there was nothing to take a mean of, and
counts: `samples` (all of them), `unparsable`, `missing`. Samples without media are in no mean.

`metrics="published"` repeats what the published evaluation does where that differs; docs/evaluation.md lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar

from ..geometry import Box, TimeSpan, Tube
from ..tasks.values import Event, SpatioTemporal

THRESHOLDS = (0.3, 0.5, 0.7)
_PUBLISHED_DIGITS = 5  # of a coordinate in the published system's answers
_PUBLISHED_TRUTH_DIGITS = 3


class Missing(Enum):
    """What stands in the place of a prediction where there was nothing to predict from."""

    MEDIA = "media"


MISSING: Final = Missing.MEDIA

Prediction = TypeVar("Prediction")
Truth = TypeVar("Truth")
Pairs = Iterable[tuple[Prediction | Missing | None, Truth]]
Result = dict[str, float | int | None]


@dataclass(frozen=True)
class TubeTruth:
    """An annotated tube.

    Attributes:
        boxes: in pixels, by the index of the frame.
        indices: the frames that the model was shown, ascending, as `Media.indices` or `sample_frame_indices` gives
            them: number i of n lies at the fraction i / (n - 1). Boxes of other frames do not count.
        width: of the picture, in pixels.
        height: likewise.
    """

    boxes: Mapping[int, Box]
    indices: Sequence[int]
    width: float
    height: float

    def frame(self, time: float) -> int:
        """The frame nearest to a fraction of the clip, of those that the model was shown."""
        return self.indices[round(time * (len(self.indices) - 1))]

    def seen(self) -> dict[int, Box]:
        """The boxes of the frames that the model was shown, in pixels, in order."""
        return {frame: self.boxes[frame] for frame in dict.fromkeys(self.indices) if frame in self.boxes}

    def tube(self) -> Tube:
        """The perfect prediction: fractions, one box per annotated frame that the model was shown."""
        last = max(len(self.indices) - 1, 1)
        times = {frame: self.indices.index(frame) / last for frame in self.seen()}
        w, h = self.width, self.height
        boxes = (Box(box.left / w, box.top / h, box.right / w, box.bottom / h) for box in self.seen().values())
        return Tube(tuple(times.values()), tuple(boxes))


@dataclass(frozen=True)
class EventTruth:
    """An annotated event: when (fractions of the clip), where, and for ELC what."""

    span: TimeSpan
    tube: TubeTruth
    caption: str = ""


def temporal_iou(a: TimeSpan, b: TimeSpan) -> float:
    """Intersection over union of two spans in the same unit, from 0 to 1.

    A span that ends before it starts meets nothing. Two spans that are the same instant are the same span: 1.

    The published denominator is the hull of both, from the first start to the last end. No choice is needed: spans that
    meet have no gap between them, so hull and union are equal, and spans that do not meet have an intersection of 0.
    """
    overlap = min(a.end, b.end) - max(a.start, b.start)
    if overlap < 0:
        return 0.0
    hull = max(a.end, b.end) - min(a.start, b.start)
    return overlap / hull if hull > 0 else 1.0


def _area(box: Box) -> float:
    return max(box.right - box.left, 0.0) * max(box.bottom - box.top, 0.0)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in the same unit, from 0 to 1; 0 where both are without area."""
    common = Box(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom))
    # Nothing where a box has its sides swapped: what is in common has them swapped, too.
    overlap = _area(common)
    union = _area(a) + _area(b) - overlap
    return overlap / union if union > 0 else 0.0


def tube_iou(predicted: Tube, truth: TubeTruth, metrics: str = "standard") -> tuple[float, float]:
    """How well boxes match, as a mean over frames, from 0 to 1: (sIoU, vIoU).

    Frames are those that the model was shown: a predicted box belongs to the frame nearest to its time, the last one
    where several do. The sum of box IoUs over frames that have both boxes is divided by the number of these frames
    (sIoU), and by the number of frames that have either (vIoU). No frames: 0.
    """
    return _tube_iou(predicted, truth, _is_published(metrics))


def _tube_iou(predicted: Tube, truth: TubeTruth, published: bool) -> tuple[float, float]:
    boxes = {}
    for time, box in zip(predicted.times, predicted.boxes, strict=True):
        edges = (box.left * truth.width, box.top * truth.height, box.right * truth.width, box.bottom * truth.height)
        boxes[truth.frame(time)] = Box(*map(round, edges)) if published else Box(*edges)
    expected = truth.seen()
    both = boxes.keys() & expected.keys()
    total = sum(box_iou(boxes[frame], expected[frame]) for frame in sorted(both))
    return total / max(len(both), 1), total / max(len(boxes.keys() | expected.keys()), 1)


def elc_caption(caption: str, metrics: str = "standard") -> str:
    """What of a predicted ELC caption is compared with the annotated one.

    All of it. Published: what follows the last comma of the first sentence.
    """
    if not _is_published(metrics):
        return caption
    return (caption + " ").split(". ")[0].rpartition(",")[2].strip()


def tvg_metrics(pairs: Pairs[TimeSpan, TimeSpan], metrics: str = "standard") -> Result:
    """Temporal video grounding: mIoU, and R@m, the share of samples with an IoU of at least m (published: above m).

    An unparsable answer has an IoU of 0.
    """
    published = _is_published(metrics)
    scored, counts = _without_missing(pairs)
    if published:
        scored = [(None if span is None else _round_span(span, _PUBLISHED_DIGITS), truth) for span, truth in scored]
    ious = [temporal_iou(span, truth) if span else 0.0 for span, truth in scored]
    return {"mIoU": _percent(ious), **_shares("R", ious, strict=published), **counts}


def rec_metrics(pairs: Pairs[Box, Box], metrics: str = "standard") -> Result:
    """Referring expressions: Acc@0.5, the share of boxes with an IoU of at least 0.5. Boxes are in fractions.

    An unparsable answer is wrong. Published: it is left out of the denominator, and true boxes are clipped to the
    picture and rounded to three digits.
    """
    scored, counts = _without_missing(pairs)
    if _is_published(metrics):
        scored = [
            (_change(box, lambda x: round(x, _PUBLISHED_DIGITS)), _change(truth, _publish_edge))
            for box, truth in scored
            if box is not None
        ]
    right = [box is not None and box_iou(box, truth) >= 0.5 for box, truth in scored]
    return {"Acc@0.5": _percent(right), **counts}


def svg_metrics(pairs: Pairs[Tube, TubeTruth], metrics: str = "standard") -> Result:
    """Spatial video grounding: means of sIoU and vIoU, and the shares of samples that reach 0.3, 0.5 and 0.7.

    An unparsable answer has an IoU of 0.
    """
    scored, counts = _without_missing(pairs)
    return {**_tube_scores(scored, _is_published(metrics)), **counts}


def stvg_metrics(pairs: Pairs[SpatioTemporal, EventTruth], metrics: str = "standard") -> Result:
    """Spatio-temporal video grounding: as SVG, and the same of the temporal IoU, tIoU.

    An unparsable answer has IoUs of 0.
    """
    published = _is_published(metrics)
    scored, counts = _without_missing(pairs)
    times = _span_scores(scored, lambda predicted, _: predicted.span, published)
    return {**times, **_tube_scores(_tubes(scored), published), **counts}


def elc_metrics(pairs: Pairs[Event, EventTruth], metrics: str = "standard") -> Result:
    """Event localization and captioning: as STVG; the predicted span is from the given start to the predicted end.

    Published: every tIoU is 0, because a span is looked for where the answer holds an end alone. Captions are scored
    elsewhere, see `elc_caption`.
    """
    published = _is_published(metrics)
    scored, counts = _without_missing(pairs)

    def span(predicted: Event, truth: EventTruth) -> TimeSpan | None:
        return None if published else TimeSpan(truth.span.start, predicted.end.time)

    return {**_span_scores(scored, span, published), **_tube_scores(_tubes(scored), published), **counts}


# By the name of the task. Tasks that are not here have captions or free text for answers.
TASK_METRICS: dict[str, Callable[..., Result]] = {
    "stvg": stvg_metrics,
    "svg": svg_metrics,
    "elc": elc_metrics,
    "tvg": tvg_metrics,
    "rec": rec_metrics,
}


def _is_published(metrics: str) -> bool:
    if metrics not in ("standard", "published"):
        raise ValueError(f'metrics: expected "standard" or "published", got {metrics!r}')
    return metrics == "published"


def _without_missing(pairs: Pairs[Any, Any]) -> tuple[list[tuple[Any, Any]], dict[str, int]]:
    pairs = list(pairs)
    scored = [(predicted, truth) for predicted, truth in pairs if predicted is not MISSING]
    unparsable = sum(predicted is None for predicted, _ in scored)
    return scored, {"samples": len(pairs), "unparsable": unparsable, "missing": len(pairs) - len(scored)}


def _tubes(scored: list[tuple[Any, EventTruth]]) -> list[tuple[Tube | None, TubeTruth]]:
    return [(None if predicted is None else predicted.tube, truth.tube) for predicted, truth in scored]


def _tube_scores(scored: list[tuple[Tube | None, TubeTruth]], published: bool) -> Result:
    ious = [_tube_iou(tube, truth, published) if tube else (0.0, 0.0) for tube, truth in scored]
    spatial, video = [s for s, _ in ious], [v for _, v in ious]
    means = {"m_sIoU": _percent(spatial), **_shares("sIoU", spatial)}
    return {**means, "m_vIoU": _percent(video), **_shares("vIoU", video)}


def _span_scores(scored: list[tuple[Any, EventTruth]], span: Callable[..., TimeSpan | None], published: bool) -> Result:
    ious = []
    for predicted, truth in scored:
        found = span(predicted, truth) if predicted is not None else None
        expected = _round_span(truth.span, _PUBLISHED_TRUTH_DIGITS) if published else truth.span
        ious.append(temporal_iou(found, expected) if found else 0.0)
    return {"m_tIoU": _percent(ious), **_shares("tIoU", ious)}


def _percent(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None


def _shares(name: str, ious: Sequence[float], strict: bool = False) -> Result:
    return {f"{name}@{t}": _percent([iou > t if strict else iou >= t for iou in ious]) for t in THRESHOLDS}


def _round_span(span: TimeSpan, digits: int) -> TimeSpan:
    return TimeSpan(round(span.start, digits), round(span.end, digits))


def _publish_edge(x: float) -> float:
    return round(min(max(x, 0.0), 1.0), _PUBLISHED_TRUTH_DIGITS)


def _change(box: Box, edge: Callable[[float], float]) -> Box:
    return Box(edge(box.left), edge(box.top), edge(box.right), edge(box.bottom))
