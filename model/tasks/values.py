"""What the tasks' answers say, as values. Items are in fractions where a parser makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

from ..geometry import Instant, Item, TimeSpan, Tube

Value = TypeVar("Value")


@dataclass(frozen=True)
class SpatioTemporal:
    """When something happens, and where the one who does it is meanwhile."""

    span: TimeSpan
    tube: Tube


@dataclass(frozen=True)
class Event:
    """What happens from a known start on: when it ends, and where the one who does it is meanwhile."""

    end: Instant
    caption: str
    tube: Tube


@dataclass(frozen=True)
class CaptionedSpan:
    """What happens in a span of the video."""

    span: TimeSpan
    caption: str


@dataclass(frozen=True)
class GroundedText:
    """Text with items between its words.

    Strings hold no white space at their ends, none is empty, and no two stand side by side.
    """

    parts: tuple[str | Item, ...]


def map_items(value: Value, change: Callable[[Item], Item]) -> Value:
    """The value of any task with each of its items changed.

    `map_items(value, media.to_absolute)` goes from fractions to seconds and pixels.
    """
    if isinstance(value, Item):
        return change(value)
    if isinstance(value, tuple):
        return tuple(map_items(part, change) for part in value)
    if is_dataclass(value):
        return replace(value, **{field.name: map_items(getattr(value, field.name), change) for field in fields(value)})
    return value
