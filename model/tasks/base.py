"""What every task is made of: a prompt, an answer, and the way back from an answer to a value."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

from ..coordinate_text import plain, read, write
from ..geometry import Box, Instant, Item, TimeSpan, Tube

Part = str | Item
Kind = TypeVar("Kind", Instant, TimeSpan, Box, Tube)

_NAMES = {Instant: "point in time", TimeSpan: "span {start, end}", Box: "box", Tube: "tube"}
# A name without < and > inside; a question's "<" for "less than" is none.
_PLACEHOLDER = re.compile(r"<([^<>\s]+)>")
_MEDIA_PLACEHOLDER = re.compile(r"<(?:image|video)>\n?")


class AnswerError(ValueError):
    """An answer that lacks what its task asks for. The message says what was expected and what came."""


class Task(ABC):
    """One kind of question.

    Attributes:
        name: its key in `TASKS`.
        media: `"video"` or `"image"`: what it is about.
        grounded: whether answers hold coordinates, so that generation is best constrained to well-formed ones.
    """

    name: str
    media: str
    grounded: bool

    @abstractmethod
    def prompt(self, **fields: Any) -> list[Part]:
        """What the user says besides showing the video or image. Items stay in the unit that they are given in."""

    @abstractmethod
    def parse(self, parts: Sequence[Part]) -> Any:
        """The value that an answer gives, whatever its wording.

        Args:
            parts: as `coordinate_text.read` gives them, in fractions.

        Raises:
            AnswerError: an item or the words that the task asks for are missing, or a coordinate is no fraction.
        """

    @abstractmethod
    def _format(self, value: Any) -> list[Part]:
        """The answer; `answer` checks that it can be read."""

    def answer(self, value: Any) -> list[Part]:
        """What the model is to say for a value in fractions: the answer of a training sample.

        Raises:
            ValueError: the answer would be read as another value, because a coordinate is no fraction, or because the
                words hold what the format gives a meaning (docs/tasks.md).
        """
        parts = self._format(value)
        try:
            found = self.parse(read(write(parts, "output"))[0])
        except AnswerError as error:
            raise ValueError(f"{self.name}: {value!r} makes no readable answer: {error}") from None
        if found != value:
            raise ValueError(f"{self.name}: expected a value that its answer gives back, got {value!r}, read {found!r}")
        return parts


def first(parts: Sequence[Part], kind: type[Kind]) -> Kind:
    """The first item of a kind."""
    for part in parts:
        if isinstance(part, kind):
            return in_fractions(part)
    raise AnswerError(f"expected a {_NAMES[kind]}, got {_describe(parts)}")


def in_fractions(item: Kind) -> Kind:
    """The item, whose coordinates are checked to be fractions."""
    for number in _numbers(item):
        if not 0 <= number <= 1:
            raise AnswerError(f"expected coordinates from 0 to 1, got {item}")
    return item


def words(parts: Iterable[Part]) -> str:
    """The text of an answer without white space around it, coordinates written out."""
    text = plain(write(parts, "output")).strip()
    if not text:
        raise AnswerError("expected words, got none")
    return text


def fill(template: str, items: Mapping[str, Item]) -> list[Part]:
    """Text with items in the places of `<name>`; `<image>` and `<video>` are left out."""
    # Text and names in turn.
    text = _PLACEHOLDER.split(_MEDIA_PLACEHOLDER.sub("", template))
    names = text[1::2]
    if set(names) != set(items):
        raise ValueError(f"items: expected one for each of {sorted(set(names))} in {template!r}, got {sorted(items)}")
    parts = [items[piece] if i % 2 else piece for i, piece in enumerate(text)]
    return [part for part in parts if part != ""]


def choose(wordings: Sequence[str], wording: int | Random) -> str:
    """One of several wordings: that of an index, or a random one."""
    index = wording.randrange(len(wordings)) if isinstance(wording, Random) else wording
    if not 0 <= index < len(wordings):
        raise ValueError(f"wording: expected 0 to {len(wordings) - 1} or a random.Random, got {wording!r}")
    return wordings[index]


def _numbers(item: Item) -> tuple[float, ...]:
    if isinstance(item, Instant):
        return (item.time,)
    if isinstance(item, TimeSpan):
        return (item.start, item.end)
    if isinstance(item, Box):
        return (item.left, item.top, item.right, item.bottom)
    return (*item.times, *(number for box in item.boxes for number in _numbers(box)))


def _describe(parts: Sequence[Part]) -> str:
    text = "".join(part if isinstance(part, str) else f"({_NAMES[type(part)]})" for part in parts).strip()
    return repr(text if len(text) <= 80 else text[:77] + "...") if text else "nothing"
