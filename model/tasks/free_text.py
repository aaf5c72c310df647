"""Tasks whose answers are words, and what their prompts say."""

from __future__ import annotations

from collections.abc import Sequence

from ..geometry import Box, TimeSpan
from .base import Part, Task, words


class FreeText(Task):
    """Value: a string without white space at its ends. Coordinates in an answer are written out in it."""

    grounded = False

    def _format(self, value: str) -> list[Part]:
        return [value]

    def parse(self, parts: Sequence[Part]) -> str:
        return words(parts)


class TemporalReferring(FreeText):
    """TR: what happens in a span."""

    name, media = "tr", "video"

    def prompt(self, span: TimeSpan) -> list[Part]:
        return ["What happens in the video during", span, "?"]


class RegionCaptioning(FreeText):
    """REG: what is in a box."""

    name, media = "reg", "image"

    def prompt(self, box: Box) -> list[Part]:
        return ["What is inside the region", box, " of this image?"]


class Captioning(FreeText):
    """What a whole video shows."""

    name, media = "captioning", "video"

    def prompt(self) -> list[Part]:
        return ["Describe the video in detail."]


class QuestionAnswering(FreeText):
    """A question about a video."""

    name, media = "qa", "video"

    def prompt(self, question: str) -> list[Part]:
        return [question]


class Conversation(FreeText):
    """One turn of a conversation about a video."""

    name, media = "conversation", "video"

    def prompt(self, message: str) -> list[Part]:
        return [message]


class Classification(FreeText):
    """Which action a video shows."""

    name, media = "classification", "video"

    def prompt(self, labels: Sequence[str] = ()) -> list[Part]:
        """With `labels`, one of them is asked for."""
        choices = f" Choose one of: {', '.join(labels)}." if labels else ""
        return [f"Which action does the video show? Answer with its name.{choices}"]
