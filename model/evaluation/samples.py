"""A sample of a benchmark: what is asked about which file, and what is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..geometry import Box, TimeSpan
from ..media import Media, stays_inside
from ..tasks import Part
from .metrics import EventTruth, TubeTruth

Truth = TimeSpan | Box | TubeTruth | EventTruth

# Of a video whose benchmark gives its name alone, in the order in which they are looked for.
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        index: its place in the data file, from 0.
        id: its name, for people.
        task: key of `TASKS`.
        media: the file, below the folder of media; the suffix of a video may be missing.
        prompt: text and items (in fractions), without the video or image.
        truth: what is right, in the units that the task's metrics take.
        clip: the first and last frame to look at, both included; None for all.
        in_seconds: the truth is a span in seconds of the file instead.
    """

    index: int
    id: str
    task: str
    media: str
    prompt: tuple[Part, ...]
    truth: Truth
    clip: tuple[int, int] | None = None
    in_seconds: bool = False

    def __post_init__(self) -> None:
        if not stays_inside(self.media) or "\0" in self.media:
            raise ValueError(f"expected the name of a file below the folder of media, got {self.media!r}")

    def file(self, folder: Path) -> Path:
        """The file in the folder of media, which need not exist."""
        named = folder / self.media
        candidates = [named, *(Path(f"{named}{suffix}") for suffix in _SUFFIXES)]
        return next((file for file in candidates if file.exists()), named)

    def truth_for(self, media: Media | None) -> Truth:
        """The truth about what the model was shown; None: nothing could be shown."""
        if media is None:
            return self.truth
        if self.in_seconds:
            return media.to_fractions(self.truth)
        if isinstance(self.truth, TubeTruth):
            return replace(self.truth, indices=media.indices)
        if isinstance(self.truth, EventTruth):
            return replace(self.truth, tube=replace(self.truth.tube, indices=media.indices))
        return self.truth
