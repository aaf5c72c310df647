"""What answers consist of besides words: points in time, spans, boxes, and boxes that move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .coordinate_text import CoordinateText


@dataclass(frozen=True)
class Instant:
    """A point in time."""

    time: float


@dataclass(frozen=True)
class TimeSpan:
    """From `start` to `end`, both included."""

    start: float
    end: float


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture whose origin is its top left corner."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Tube:
    """A box at each of several times: `boxes[i]` at `times[i]`."""

    times: tuple[float, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.boxes):
            raise ValueError(f"a tube needs one box per time, got {len(self.boxes)} boxes and {len(self.times)} times")

    @property
    def span(self) -> TimeSpan:
        """From the first to the last time."""
        return TimeSpan(min(self.times), max(self.times))


# All come in two units: fractions of the clip and of the picture, which the language model reads and writes, and
# seconds and pixels, which users do. `Media.to_absolute` and `Media.to_fractions` go from one to the other.
Item = Instant | TimeSpan | Box | Tube


def change_units(
    item: Item, time: Callable[[float], float], x: Callable[[float], float], y: Callable[[float], float]
) -> Item:
    """The item with its times, horizontal and vertical coordinates changed."""
    if isinstance(item, Instant):
        return Instant(time(item.time))
    if isinstance(item, TimeSpan):
        return TimeSpan(time(item.start), time(item.end))
    if isinstance(item, Box):
        return Box(x(item.left), y(item.top), x(item.right), y(item.bottom))
    boxes = tuple(change_units(box, time, x, y) for box in item.boxes)
    return Tube(tuple(map(time, item.times)), boxes)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        parts: text and items in the order of the answer, in seconds and pixels.
        text: the answer as one string, coordinates written out.
        finished: whether the model ended the answer itself (and not the limit of new tokens).
        problems: what could not be read, in words; empty where all is well.
        value: what the task's parser made of it, in seconds and pixels; None without a task, and where it could not.
        written: what the model wrote, with template tokens for coordinates, and these as fractions.
    """

    parts: tuple[str | Item, ...]
    text: str
    finished: bool = True
    problems: tuple[str, ...] = ()
    value: object = None
    written: CoordinateText | None = None

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(part for part in self.parts if not isinstance(part, str))
