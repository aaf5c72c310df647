"""What prompts and answers consist of besides words: points in time, spans, boxes, and boxes that move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instant:
    """A point in time."""

    time: float


@dataclass(frozen=True)
class TimeSpan:
    """A part of a video, in seconds, or in fractions of it.

    Attributes:
        start: included.
        end: included.
    """

    start: float
    end: float


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture whose origin is its top left corner, in pixels, or in fractions of width and height.

    Attributes:
        left: its first edge.
        top: likewise.
        right: its last edge.
        bottom: likewise.
    """

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
