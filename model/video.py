"""A video file to the pixel values that the vision encoder takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike, fspath

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SIZE = 384


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
    name = fspath(path)
    try:
        with av.open(name) as container:
            if not container.streams.video:
                raise ValueError(f"{name}: has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such video file") from None
    except av.FFmpegError as error:
        raise ValueError(f"{name}: cannot be decoded as a video: {error.strerror}") from error


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


def preprocess(frames: Sequence[np.ndarray]) -> Tensor:
    """uint8 RGB frames `[height, width, 3]` to float32 `[T, 3, 384, 384]` with values in `[-1, 1]`.

    Each frame is stretched to the square, neither padded nor cropped, so a coordinate stays the same fraction of the
    original width and height. Bicubic as in PIL, rounded to uint8 before scaling.
    """
    pixels = torch.empty(len(frames), 3, IMAGE_SIZE, IMAGE_SIZE)
    for i, frame in enumerate(frames):
        resized = Image.fromarray(frame).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels[i] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return pixels.mul_(1 / 255).sub_(0.5).div_(0.5)
