"""Tasks whose answers say what happens and when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from ..geometry import Instant, Item, TimeSpan, Tube
from .base import AnswerError, Part, Task, fill, first, in_fractions, words
from .st_align import OBJECT, phrase_span, tube
from .values import CaptionedSpan, Event

_OBJECT_AT_END = re.compile(rf"{OBJECT}?$", re.IGNORECASE)


class EventLocalization(Task):
    """ELC: when an event that starts at a given time ends, what it is, and where its object is. Value: `Event`."""

    name, media, grounded = "elc", "video", True

    def prompt(
        self,
        question: str = "Starts in <s>, what event is the object/subject in the region <box> associated with?",
        wording: int | Random = 0,
        **items: Item,
    ) -> list[Part]:
        """A question about one object; `<name>` in it is the place of the item of that name.

        `From <s> to <e>` becomes one of eight phrases before a span.
        """
        suffix = (
            "Please firstly give the end timestamp, then give the event associated with the object/subject, finally "
            "give the spatial bounding box corresponding to each timestamp in the time period."
        )
        return fill(*phrase_span(question + suffix, items, wording))

    def _format(self, value: Event) -> list[Part]:
        return ["Ends in ", value.end, f", {value.caption}. {OBJECT} ", value.tube]

    def parse(self, parts: Sequence[Part]) -> Event:
        end, boxes = first(parts, Instant), tube(parts)
        start = next(i for i, part in enumerate(parts) if isinstance(part, Instant)) + 1
        # Items that are no tube belong to the caption, written out.
        stop = next((i for i, part in enumerate(parts) if isinstance(part, Tube) and i >= start), len(parts))
        text = _OBJECT_AT_END.sub("", words(parts[start:stop]))
        return Event(end, _caption(text), boxes)


class DenseCaptioning(Task):
    """DVC: all events of a video. Value: a tuple of `CaptionedSpan`, in the order of the answer."""

    name, media, grounded = "dvc", "video", True

    def prompt(self) -> list[Part]:
        return ["Describe all events of the video in detail, each with its start and end timestamps."]

    def _format(self, value: Sequence[CaptionedSpan]) -> list[Part]:
        return [part for event in value for part in (event.span, f", {event.caption}. ")]

    def parse(self, parts: Sequence[Part]) -> tuple[CaptionedSpan, ...]:
        first(parts, TimeSpan)
        starts = [i for i, part in enumerate(parts) if isinstance(part, TimeSpan)]
        stops = [*starts[1:], len(parts)]
        return tuple(
            CaptionedSpan(in_fractions(parts[start]), _caption(words(parts[start + 1 : stop])))
            for start, stop in zip(starts, stops, strict=True)
        )


def _caption(text: str) -> str:
    """The words of `, words. `"""
    caption = text.strip().removeprefix(",").removesuffix(".").strip()
    if not caption:
        raise AnswerError(f"expected a caption, got {text!r}")
    return caption
