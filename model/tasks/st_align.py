"""What questions and answers of the ST-Align tasks STVG, SVG and ELC have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from random import Random

from ..geometry import Item, TimeSpan, Tube
from .base import Part, choose, first, in_fractions

OBJECT = "Object bounding box:"
SPAN_WORDINGS = (
    "During the span of",
    "In the time range",
    "During the period",
    "Within the time frame of",
    "In the time period",
    "During",
    "Between",
    "At",
)
_GIVEN_SPAN = "From <s> to <e>"


def phrase_span(question: str, items: Mapping[str, Item], wording: int | Random) -> tuple[str, dict[str, Item]]:
    """Question and items where `From <s> to <e>`, if it is there, has become a phrase before a span."""
    items = dict(items)
    if _GIVEN_SPAN in question and {"s", "e"} <= items.keys():
        question = question.replace(_GIVEN_SPAN, f"{choose(SPAN_WORDINGS, wording)} <span>")
        items["span"] = TimeSpan(items.pop("s").time, items.pop("e").time)
    return question, items


def tube(parts: Sequence[Part]) -> Tube:
    """All boxes of an answer about one object.

    Where one box is malformed, what is before and behind it are two tubes: both belong to the object.
    """
    first(parts, Tube)
    tubes = [in_fractions(part) for part in parts if isinstance(part, Tube)]
    times, boxes = (tuple(chain.from_iterable(each)) for each in zip(*((t.times, t.boxes) for t in tubes), strict=True))
    return Tube(times, boxes)
