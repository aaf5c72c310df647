"""A video to the pixel values that the vision encoder takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .decoding import FrameIndex, UnexpectedFrameError, index_frames, index_packets, open_video, read_displayed
from .image import IMAGE_SIZE, Picture, as_uint8, load_image, preprocess, read_image
from .media import Media

__all__ = [
    "count_frames",
    "displayed_frames",
    "load_image",
    "load_video",
    "preprocess",
    "read_frames",
    "sample_frame_indices",
]

_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

Video = str | PathLike[str] | np.ndarray | Tensor | Sequence[Picture]


def sample_frame_indices(clip: int | tuple[int, int], count: int) -> list[int]:
    """Indices of `count` frames spread evenly over a clip, both ends included.

    Args:
        clip: the number of frames in the clip, or its first and last frame index, both inclusive.
        count: how many indices; a clip that is shorter repeats frames.

    Halves are rounded to even. A single frame is the clip's first, as frame 0 is for every other count.
    """
    first, last = (0, clip - 1) if isinstance(clip, int) else clip
    if not 0 <= first <= last:
        raise ValueError(f"clip: expected a frame count of at least 1 or 0 <= first <= last, got {clip!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    # i / (count - 1) comes first, as in the published rule: another order of operations rounds differently at halves.
    return [first + round(i / max(count - 1, 1) * (last - first)) for i in range(count)]


def _decode(path: str | PathLike[str]) -> Iterator[av.VideoFrame]:
    with open_video(fspath(path)) as (container, stream):
        yield from container.decode(stream)


def count_frames(path: str | PathLike[str]) -> int:
    """How many frames decode. What a container says of itself is absent in some formats and wrong in some files."""
    return sum(1 for _ in _decode(path))


def read_frames(path: str | PathLike[str], indices: Sequence[int]) -> list[np.ndarray]:
    """The frames at `indices` (any order, repeats allowed) as uint8 RGB arrays `[height, width, 3]`.

    Decodes from the start and stops behind the last index; holds only the frames that were asked for. An index counts
    decoded frames, so neither a frame rate nor timestamps matter.
    """
    if not indices:
        return []
    if min(indices) < 0:
        raise IndexError(f"{fspath(path)}: frame indices start at 0, got {min(indices)}")
    wanted, last = set(indices), max(indices)
    found: dict[int, np.ndarray] = {}
    decoded = 0
    for decoded, frame in enumerate(_decode(path), start=1):
        if decoded - 1 in wanted:
            found[decoded - 1] = frame.to_ndarray(format="rgb24")
        if decoded > last:
            break
    if decoded <= last:
        raise IndexError(f"{fspath(path)}: frame {last} was asked for, but only {decoded} frames decode")
    return [found[index] for index in indices]


def load_video(
    source: Video,
    num_frames: int = 100,
    image_size: int = IMAGE_SIZE,
    clip: tuple[int, int] | None = None,
    fps: float | None = None,
) -> tuple[Tensor, Media]:
    """Frames spread evenly over a video, and what is known of it.

    Args:
        source: a file's name, a folder of pictures (in the order of the numbers in their names), a list of what
            `load_image` takes, or a uint8 array or tensor `[T, H, W, 3]` or `[T, 3, H, W]`.
        num_frames: how many frames; shorter clips repeat some.
        image_size: height and width of the result in pixels.
        clip: the first and last frame to look at, both inclusive; all by default.
        fps: frames per second; by default a file's own times, however irregular, and 1 for sources without times.

    Returns:
        float32 `[num_frames, 3, image_size, image_size]` in `[-1, 1]`, and the `Media`, with the frames' seconds.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: with its name: what cannot be decoded, a clip that it has not, a negative `fps`.

    Frames of files are turned and stretched as players display them. Decodes only what it must, and each frame is
    converted at once, so that memory is bounded by the result. A file that was cut off or breaks is refused unless
    `clip` ends before the break, since every fraction of time would be wrong. A damaged frame is a warning.
    """
    if fps is not None and not fps > 0:
        raise ValueError(f"fps: expected a positive number, got {fps}")
    if isinstance(source, (str, PathLike)) and not Path(source).is_dir():
        return _load_file(fspath(source), num_frames, image_size, clip, fps)
    name = fspath(source) if isinstance(source, (str, PathLike)) else None
    pictures = _pictures(source)
    indices = _sample(name or "video", len(pictures), num_frames, clip)
    frames = (_with_size(read_image(pictures[k])) for k in dict.fromkeys(indices))
    pixels, width, height = _collect(frames, indices, image_size)
    return pixels, Media("video", width, height, tuple(k / (fps or 1.0) for k in indices), tuple(indices), name)


def displayed_frames(source: Video, fps: float | None = None) -> Iterator[tuple[float, np.ndarray, int, int]]:
    """All frames of a video one after another, as they are displayed: the second from the first frame, uint8 RGB
    `[H, W, 3]`, and the display's width and height in square pixels. Of a file that breaks, those before the break.

    Args:
        source: as for `load_video`.
        fps: likewise.
    """
    if isinstance(source, (str, PathLike)) and not Path(source).is_dir():
        name = fspath(source)
        index = index_frames(name, index_packets(name))
        seconds = index.seconds() if fps is None else [k / fps for k in range(len(index.pts))]
        frames: Iterable[tuple[np.ndarray, int, int]] = read_displayed(name, index, range(len(seconds)))
    else:
        pictures = _pictures(source)
        seconds = [k / (fps or 1.0) for k in range(len(pictures))]
        frames = (_with_size(read_image(picture)) for picture in pictures)
    for second, frame in zip(seconds, frames, strict=True):
        yield second, *frame


def _load_file(
    name: str, num_frames: int, image_size: int, clip: tuple[int, int] | None, fps: float | None
) -> tuple[Tensor, Media]:
    def load(index: FrameIndex) -> tuple[Tensor, Media]:
        count = len(index.pts)
        if index.damage and (clip is None or clip[1] >= count):
            usable = f"Frames 0 to {count - 1} can be used: clip=(0, {count - 1})" if count else "No frame can be used"
            raise ValueError(f"{name}: {index.damage}. {usable}")
        indices = _sample(name, count, num_frames, clip)
        frames = read_displayed(name, index, list(dict.fromkeys(indices)))
        pixels, width, height = _collect(frames, indices, image_size)
        seconds = index.seconds() if fps is None else [k / fps for k in range(count)]
        return pixels, Media("video", width, height, tuple(seconds[k] for k in indices), tuple(indices), name)

    packets = index_packets(name)
    if packets.starts:
        try:
            return load(packets)
        except UnexpectedFrameError:
            pass
    return load(index_frames(name, packets))


def _pictures(source: Video) -> Sequence[Picture]:
    """The frames of a folder, an array, a tensor or a list, each something that `read_image` takes."""
    if isinstance(source, (str, PathLike)):
        files = [file for file in Path(source).iterdir() if file.suffix.lower() in _PICTURES and file.name[0] != "."]
        return sorted(files, key=_numbered)
    if isinstance(source, (np.ndarray, Tensor)):
        frames = as_uint8(source, "video")
        first, last = frames.shape[1:2] == (3,), frames.shape[3:] == (3,)
        if frames.ndim != 4 or not (first or last):
            raise ValueError(f"video: expected [T, H, W, 3] or [T, 3, H, W], got {list(frames.shape)}")
        # Where both fit, tensors have channels first and arrays last.
        return frames.transpose(0, 2, 3, 1) if first and (isinstance(source, Tensor) or not last) else frames
    if not isinstance(source, Sequence):
        raise TypeError(f"video: expected a file, a folder, an array, a tensor or a list, got {type(source).__name__}")
    return source


def _numbered(file: Path) -> list[str | int]:
    """Text and numbers of its name in turn."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split("([0-9]+)", file.name))]


def _sample(name: str, count: int, num_frames: int, clip: tuple[int, int] | None) -> list[int]:
    if not count:
        raise ValueError(f"{name}: has no frames")
    first, last = clip or (0, count - 1)
    if not 0 <= first <= last < count:
        raise ValueError(f"{name}: clip: expected 0 <= first <= last < {count} frames, got {clip}")
    return sample_frame_indices((first, last), num_frames)


def _with_size(picture: np.ndarray) -> tuple[np.ndarray, int, int]:
    return picture, picture.shape[1], picture.shape[0]


def _collect(
    frames: Iterable[tuple[np.ndarray, int, int]], indices: list[int], image_size: int
) -> tuple[Tensor, int, int]:
    """The pixels of `frames`, each repeated as often as its index is; the width and height that the first displays."""
    pixels = torch.empty(len(indices), 3, image_size, image_size)
    row, size = 0, (0, 0)
    for (picture, *shape), repeats in zip(frames, Counter(indices).values(), strict=True):
        if row == 0:
            size = shape
        pixels[row : row + repeats] = preprocess([picture], image_size)
        row += repeats
    return pixels, *size
