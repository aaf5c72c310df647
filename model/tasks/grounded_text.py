"""Tasks whose answers are words with items among them."""

from __future__ import annotations

from collections.abc import Sequence

from ..geometry import Box, Item
from .base import AnswerError, Part, Task, first, in_fractions
from .values import GroundedText

_CLOSING = tuple(",.;:!?)'\"")


class _Grounded(Task):
    """Value: `GroundedText`."""

    grounded = True

    def _format(self, value: GroundedText) -> list[Part]:
        """The parts with spaces between them, except before closing and behind opening punctuation."""
        parts: list[Part] = []
        for part in value.parts:
            closing = isinstance(part, str) and part.startswith(_CLOSING)
            opening = bool(parts) and isinstance(parts[-1], str) and parts[-1].endswith("(")
            if parts and not closing and not opening:
                parts.append(" ")
            parts.append(part)
        return _joined(parts)

    def parse(self, parts: Sequence[Part]) -> GroundedText:
        for part in parts:
            if isinstance(part, Item):
                in_fractions(part)
        stripped = (part.strip() if isinstance(part, str) else part for part in _joined(parts))
        found = tuple(part for part in stripped if part != "")
        if not found:
            raise AnswerError("expected words, got none")
        return GroundedText(found)


class _GroundedConversation(_Grounded):
    def prompt(self, message: str | Sequence[Part]) -> list[Part]:
        """A message of words, or of words and items."""
        return [message] if isinstance(message, str) else list(message)


class TemporalGroundedConversation(_GroundedConversation):
    """One turn of a conversation about a video, whose answer may name times."""

    name, media = "temporal_grounded_conversation", "video"


class ImageGroundedConversation(_GroundedConversation):
    """One turn of a conversation about an image, whose answer may name boxes."""

    name, media = "image_grounded_conversation", "image"


class DenseGroundedCaptioning(_Grounded):
    """DGC: a description with the box of each thing behind its name, one box at least."""

    name, media = "dgc", "image"

    def prompt(self) -> list[Part]:
        return ["Describe this image in detail and give the bounding box of each object that you mention."]

    def parse(self, parts: Sequence[Part]) -> GroundedText:
        first(parts, Box)
        return super().parse(parts)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with neighbouring strings made one."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found
