"""Tasks whose answers are a span, a box or a tube alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ..geometry import Box, Item, TimeSpan, Tube
from .base import Part, Task, choose, fill, first
from .st_align import OBJECT, phrase_span, tube
from .values import SpatioTemporal

_TUBE = "give the spatial bounding box corresponding to each timestamp in the time period."


class SpatioTemporalGrounding(Task):
    """STVG: when something happens and where it is meanwhile. Value: `SpatioTemporal`."""

    name, media, grounded = "stvg", "video", True

    def prompt(self, question: str, **items: Item) -> list[Part]:
        """A question about one object; `<name>` in it is the place of the item of that name."""
        return fill(f"{question}Please firstly give the timestamps, and then {_TUBE}", items)

    def _format(self, value: SpatioTemporal) -> list[Part]:
        return [value.span, f"{OBJECT} ", value.tube]

    def parse(self, parts: Sequence[Part]) -> SpatioTemporal:
        return SpatioTemporal(first(parts, TimeSpan), tube(parts))


class SpatialGrounding(Task):
    """SVG: where something is in a span that the question gives. Value: `Tube`."""

    name, media, grounded = "svg", "video", True

    def prompt(self, question: str, wording: int | Random = 0, **items: Item) -> list[Part]:
        """A question about one object; `<name>` in it is the place of the item of that name.

        `From <s> to <e>` becomes one of eight phrases before a span.
        """
        return fill(*phrase_span(f"{question}Please {_TUBE}", items, wording))

    def _format(self, value: Tube) -> list[Part]:
        return [f"{OBJECT} ", value]

    def parse(self, parts: Sequence[Part]) -> Tube:
        return tube(parts)


class TemporalGrounding(Task):
    """TVG: when an event happens. Value: `TimeSpan`."""

    name, media, grounded = "tvg", "video", True

    def prompt(self, event: str) -> list[Part]:
        return [
            f"Give you a textual query: '{event}'. When does the described content occur in the video? "
            "Please return the start and end timestamps."
        ]

    def _format(self, value: TimeSpan) -> list[Part]:
        return [value]

    def parse(self, parts: Sequence[Part]) -> TimeSpan:
        return first(parts, TimeSpan)


class ReferringExpression(Task):
    """REC: where a thing that is described is in an image. Value: `Box`."""

    name, media, grounded = "rec", "image", True
    wordings = (
        "Where can I find {} in this image?",
        "What part of this image contains {}?",
        "Where does {} appear in this image?",
        "Where is {} situated within this image?",
    )

    def prompt(self, event: str, wording: int | Random = 0) -> list[Part]:
        """The published evaluation draws one of the four wordings: `wording=random.Random(seed)`."""
        return [choose(self.wordings, wording).format(event)]

    def _format(self, value: Box) -> list[Part]:
        return [value]

    def parse(self, parts: Sequence[Part]) -> Box:
        return first(parts, Box)
