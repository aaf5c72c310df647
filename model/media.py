"""What is known of a video or an image that a prompt shows."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from os import PathLike, path

from .geometry import Item, change_units


def stays_inside(name: str, folder: str | PathLike[str] = "") -> bool:
    """Whether a file's name, absolute or taken from a folder, is one below that folder; links are not followed."""
    return path.relpath(path.join(folder, name), folder or ".").split(path.sep)[0] != path.pardir


@dataclass(frozen=True)
class Media:
    """A video or an image as the model sees it.

    Attributes:
        kind: `"video"` or `"image"`.
        width: of the displayed picture (after rotation, with square pixels), in pixels.
        height: likewise.
        timestamps: seconds from the start of the file of each sampled frame, ascending (repeats where a short clip
            repeats frames); `(0.0,)` for an image.
        indices: which frames were sampled; empty for an image.
        source: the file's name, where it came from one.

    Sampled frame i of T is at the fraction `i / (T - 1)`, and fractions between two frames lie between their
    timestamps: right for files whose frame rate varies, too.
    """

    kind: str
    width: int
    height: int
    timestamps: tuple[float, ...] = (0.0,)
    indices: tuple[int, ...] = ()
    source: str | None = None

    def seconds(self, fraction: float) -> float:
        """The time at a fraction of the clip; fractions beyond [0, 1] are clipped."""
        last = len(self.timestamps) - 1
        place = min(max(fraction, 0.0), 1.0) * last
        low = min(int(place), max(last - 1, 0))
        high = min(low + 1, last)
        return self.timestamps[low] + (place - low) * (self.timestamps[high] - self.timestamps[low])

    def fraction(self, seconds: float) -> float:
        """The fraction of the clip at a time, clipped to [0, 1]: the first where frames repeat."""
        times, last = self.timestamps, len(self.timestamps) - 1
        if last == 0 or seconds <= times[0]:
            return 0.0
        if seconds >= times[-1]:
            # The first of the frames that repeat the last one.
            return times.index(times[-1]) / last
        low = bisect_right(times, seconds) - 1
        return (low + (seconds - times[low]) / (times[low + 1] - times[low])) / last

    def to_absolute(self, item: Item) -> Item:
        """From fractions to seconds and pixels."""
        return change_units(item, self.seconds, lambda x: x * self.width, lambda y: y * self.height)

    def to_fractions(self, item: Item) -> Item:
        """From seconds and pixels to fractions."""
        return change_units(item, self.fraction, lambda x: x / self.width, lambda y: y / self.height)
