"""Answers drawn over what they are about: boxes, spans and points in time on pictures and videos."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike, fspath
from typing import IO

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..answer import Answer
from ..geometry import Box, Instant, Item, TimeSpan, Tube
from ..tasks import CaptionedSpan, Event
from ..video import Video, displayed_frames

# Okabe and Ito's, which colour-blind people tell apart, without black.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
# Long side of drawings, in pixels: labels stay readable on tiny pictures, pages small with huge ones.
_SMALLEST, _LARGEST = 480, 1280
_INSTANT_SECONDS = 0.5  # how long the name of a point in time is shown
_TICKS = 90_000  # per second, in the videos that are written
_NAMES = {Instant: "time", TimeSpan: "span", Box: "box", Tube: "tube"}


@dataclass(frozen=True)
class Mark:
    """An item of an answer as it is drawn: in seconds and pixels, with a name and a colour (`#rrggbb`)."""

    item: Item
    label: str
    colour: str

    @property
    def ink(self) -> str:
        """Black or white, whichever is read more easily on the colour."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"


def marks(answer: Answer) -> list[Mark]:
    """What is drawn of an answer, in its order: its items, except tubes without boxes.

    A caption that the task's value pairs with an item is its name; else the words right before it are.
    """
    named: list[tuple[str, Item]] = []
    if isinstance(answer.value, Event):
        named = [(answer.value.caption, answer.value.end), (answer.value.caption, answer.value.tube)]
    elif isinstance(answer.value, tuple) and answer.value and isinstance(answer.value[0], CaptionedSpan):
        named = [(event.caption, event.span) for event in answer.value]
    else:
        words = ""
        for part in answer.parts:
            if isinstance(part, str):
                words = part
            else:
                named.append((words, part))
                words = ""
    named = [(words, item) for words, item in named if not isinstance(item, Tube) or item.times]
    return [
        Mark(item, _shorten(words) or f"{_NAMES[type(item)]} {i + 1}", COLOURS[i % len(COLOURS)])
        for i, (words, item) in enumerate(named)
    ]


def _shorten(words: str, length: int = 40) -> str:
    """The end of the words on one line, where what names an item stands; empty where there are no letters."""
    line = "".join(c for c in " ".join(words.split()) if c.isprintable() and c != "\ufffd").strip(" .,:;!?()[]{}")
    if not any(c.isalnum() for c in line):
        return ""
    return line if len(line) <= length else "…" + line[-length + 1 :].lstrip()


def is_shown(item: Item, start: float, end: float) -> bool:
    """Whether an item belongs to a frame that is displayed from `start` until `end` (seconds)."""
    if isinstance(item, Box):
        return True
    if isinstance(item, Instant):
        first, last = item.time, item.time + _INSTANT_SECONDS
    else:
        span = item.span if isinstance(item, Tube) else item
        first, last = sorted((span.start, span.end))
    # A tube's times are those of frames, up to rounding.
    return start <= last + 1e-6 and first < end - 1e-6


def box_at(item: Item, start: float, end: float) -> Box | None:
    """The box to draw on a frame that is displayed from `start` until `end`, in pixels with ordered corners.

    Between the times of a tube its box moves evenly. None where there is no box, then or ever.
    """
    if isinstance(item, Box):
        return _ordered(item)
    if not isinstance(item, Tube) or not is_shown(item, start, end):
        return None
    # By time; of several boxes at one time, the last.
    entries = sorted(dict(zip(item.times, item.boxes, strict=True)).items())
    times = [time for time, _ in entries]
    now = min(max(start, times[0]), times[-1])
    after = bisect_right(times, now)
    (t0, a), (t1, b) = entries[after - 1], entries[min(after, len(entries) - 1)]
    weight = (now - t0) / (t1 - t0) if t1 > t0 else 0.0
    pairs = zip(_corners(a), _corners(b), strict=True)
    return _ordered(Box(*(x + weight * (y - x) for x, y in pairs)))


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


def _ordered(box: Box) -> Box:
    (left, right), (top, bottom) = sorted((box.left, box.right)), sorted((box.top, box.bottom))
    return Box(left, top, right, bottom)


def drawing_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the drawing of a picture, both even, as video codecs want them."""
    long = max(width, height)
    scale = min(max(long, _SMALLEST), _LARGEST) / long
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def draw(picture: Image.Image, found: Sequence[Mark], start: float, end: float, size: tuple[int, int]) -> None:
    """Draws on a picture what is shown from `start` until `end` (seconds).

    Args:
        picture: is changed.
        found: what to draw.
        start, end: when the picture is displayed.
        size: width and height in which boxes are given.
    """
    canvas = ImageDraw.Draw(picture)
    line = max(2, min(picture.size) // 160)
    bottom = picture.height
    for mark in found:
        box = box_at(mark.item, start, end)
        if box is not None:
            x, y = picture.width / size[0], picture.height / size[1]
            edges = (box.left * x, box.top * y, box.right * x, box.bottom * y)
            canvas.rectangle(edges, outline=mark.colour, width=line)
            _write(picture, edges[0], edges[1], mark)
        elif bottom > 0 and not isinstance(mark.item, Tube) and is_shown(mark.item, start, end):
            bottom = _write(picture, 0, bottom, mark)


def _write(picture: Image.Image, left: float, bottom: float, mark: Mark) -> int:
    """The label, with its lower left corner there or as near as it is seen; returns its top."""
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, min(picture.size) // 28))
    _, _, width, height = (math.ceil(x) + 6 for x in canvas.textbbox((0, 0), mark.label, font))
    x = max(0, min(round(left), picture.width - width))
    y = max(0, min(round(bottom), picture.height) - height)
    canvas.rectangle((x, y, x + width, y + height), fill=mark.colour)
    canvas.text((x + 3, y + 2), mark.label, fill=mark.ink, font=font)
    return y


def annotate_image(answer: Answer, picture: np.ndarray, path: str | PathLike[str]) -> None:
    """Writes a picture, uint8 RGB `[H, W, 3]`, with the answer's boxes; the name's ending chooses the format."""
    height, width = picture.shape[:2]
    drawing = Image.fromarray(picture).resize(drawing_size(width, height), Image.Resampling.BICUBIC)
    draw(drawing, [mark for mark in marks(answer) if isinstance(mark.item, Box)], 0.0, math.inf, (width, height))
    drawing.save(path)


@dataclass(frozen=True)
class Shot:
    """A frame that is drawn: its picture in the size of drawings, when it is displayed (seconds), and the width and
    height in which boxes are given."""

    picture: Image.Image
    start: float
    end: float
    size: tuple[int, int]


def shots(source: Video, fps: float | None = None) -> Iterator[Shot]:
    """All frames of a video, see `displayed_frames`, one after another. The last lasts as long as the one before it."""
    before: tuple[float, Image.Image] | None = None
    size = drawn = (0, 0)
    lasts = 1.0 / (fps or 25.0)
    for second, frame, width, height in displayed_frames(source, fps):
        if before is None:
            size, drawn = (width, height), drawing_size(width, height)
        else:
            lasts = second - before[0]
            yield Shot(before[1], before[0], second, size)
        before = second, Image.fromarray(frame).resize(drawn, Image.Resampling.BICUBIC)
    if before is not None:
        yield Shot(before[1], before[0], before[0] + lasts, size)


def write_video(frames: Iterable[Shot], target: str | PathLike[str] | IO[bytes]) -> None:
    """An H.264 MP4, which browsers play, with the frames at their own times. Raises ValueError if there are none."""
    file = fspath(target) if isinstance(target, (str, PathLike)) else target
    with av.open(file, "w", format="mp4") as container:
        stream, last = None, -1
        for shot in frames:
            if stream is None:
                stream = container.add_stream("h264", rate=25)
                stream.width, stream.height = shot.picture.size
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = Fraction(1, _TICKS)
            frame = av.VideoFrame.from_image(shot.picture)
            last = max(last + 1, round(shot.start * _TICKS))
            frame.pts, frame.time_base = last, stream.codec_context.time_base
            frame.duration = max(1, round(shot.end * _TICKS) - last)
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("video: has no frames to write")
        container.mux(stream.encode(None))


def annotate_video(answer: Answer, source: Video, path: str | PathLike[str], fps: float | None = None) -> None:
    """Writes an MP4 of a video with what the answer says of each frame drawn on it.

    Args:
        answer: in seconds and pixels of the video.
        source: as for `load_video`.
        path: of the MP4.
        fps: as for `load_video`.
    """
    found = marks(answer)

    def annotated() -> Iterator[Shot]:
        for shot in shots(source, fps):
            draw(shot.picture, found, shot.start, shot.end, shot.size)
            yield shot

    write_video(annotated(), path)
