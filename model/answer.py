"""What the model said."""

from __future__ import annotations

from dataclasses import dataclass

from .coordinate_text import CoordinateText
from .geometry import Item


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
