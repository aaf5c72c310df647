"""Small videos for the tests, made on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np


def moving_square(count: int, width: int = 64, height: int = 48) -> Iterable[np.ndarray]:
    """Frames `[height, width, 3]`, no two alike: a bright square that moves to the right over noise."""
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    for i in range(count):
        frame = noise.copy()
        left = i * (width - height // 4) // max(count - 1, 1)
        frame[height // 4 : height // 2, left : left + height // 4] = (255, 40 + i % 200, 0)
        yield frame


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    keyframe_every: int = 12,
    pixel_aspect: Fraction | None = None,
    rotation: int | None = None,
    mirrored: bool = False,
    milliseconds: Sequence[int] | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes RGB frames; the name's ending chooses the container.

    `rotation` is counter-clockwise, in degrees, by the container's display matrix; `milliseconds` are the times of the
    frames where their rate varies.
    """
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, keyframe_every
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=mirrored)
        time_base = Fraction(1, rate) if milliseconds is None else Fraction(1, 1000)
        stream.codec_context.time_base = time_base
        for i, array in enumerate(chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = i if milliseconds is None else milliseconds[i], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_video(source: Path, target: Path, shift: int = 0) -> Path:
    """The same packets in another container, `shift` frames earlier: those before 0 are kept but not displayed."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.size:
                earlier = round(shift / stream.average_rate / packet.time_base)
                packet.pts -= earlier
                packet.dts = packet.pts if packet.dts is None else packet.dts - earlier
                packet.stream = copy
                new.mux(packet)
    return target


def write_sound(path: Path) -> Path:
    """A file without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path
