"""Frames of a video file by PyAV: where they are, and reading some of them without decoding all."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from os.path import exists, isfile

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .image import MAX_PIXELS

# Packets of these codecs hold one displayed picture each, and these containers say which packets decoding can start at
# and when every packet is displayed: frames can be counted and found without decoding. Not so elsewhere: VP8 and MPEG-4
# have packets that show nothing, raw streams no times.
_ONE_PICTURE_PER_PACKET = {"h264", "hevc", "vp9", "av1", "mjpeg", "ffv1", "prores"}
_INDEXED = {"mov", "mp4", "matroska", "webm"}
# Containers whose header says how long the file is meant to be.
_DURATION_DECLARED = _INDEXED | {"avi"}
_MISSING_SECONDS = 0.5
# What is opened at all: files that hold their pictures. A few lines of text can ask FFmpeg for other files (`concat`,
# `hls`, `dash`), and a name for all that match it (`image2`).
_FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,asf,mpegts,mpeg,mpegvideo,h264,hevc,vvc,obu,av1,ivf,ogg,gif,mxf,nut,dv,m4v,mjpeg,"
    "yuv4mpegpipe,wav"
)


class UnexpectedFrameError(ValueError):
    """Decoding gives other frames than the packets promised."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file in the order of display.

    Attributes:
        pts: when each is displayed, in units of `time_base`; None where the file does not say.
        time_base: seconds per unit.
        rate: frames per second that the file claims; None where it does not.
        starts: (frame, dts) of those frames that decoding can start at; empty unless seeking is exact.
        damage: why frames are missing after the last; empty where none are.
    """

    pts: tuple[int | None, ...]
    time_base: Fraction
    rate: Fraction | None
    starts: tuple[tuple[int, int], ...] = ()
    damage: str = ""

    def seconds(self) -> list[float]:
        """Of each frame, from the first. Without usable times in the file, by its frame rate (25 where it has none)."""
        if None not in self.pts and all(a < b for a, b in pairwise(self.pts)):
            return [float((pts - self.pts[0]) * self.time_base) for pts in self.pts]
        rate = self.rate or Fraction(25)
        return [float(i / rate) for i in range(len(self.pts))]


@contextmanager
def open_video(name: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream; errors inside are raised again with the file's name."""
    if exists(name) and not isfile(name):
        raise ValueError(f"{name}: is not a file")  # a pipe would be waited for
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        with av.open(name, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"{name}: has no video stream (sound only, or a file that was cut off)")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"{name}: has a video stream of an unknown codec")
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                size = f"{stream.codec_context.width} x {stream.codec_context.height}"
                raise ValueError(f"{name}: has frames of {size} pixels, at most {MAX_PIXELS} in all are accepted")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may grow later on
            stream.thread_type = "AUTO"
            yield container, stream
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such video file") from None
    except av.FFmpegError as error:
        raise ValueError(f"{name}: cannot be decoded as a video: {error.strerror}") from error


def index_packets(name: str) -> FrameIndex:
    """The frames that packets promise. Reads the file once and decodes nothing.

    `starts` is empty where packets do not tell the frames exactly, and `index_frames` is needed.
    """
    packets: list[tuple[int | None, int | None, bool]] = []
    end, damage = Fraction(0), ""
    with open_video(name) as (container, stream):
        for packet in _demux(container, *container.streams):
            if packet.is_corrupt:
                damage = damage or f"bytes are missing after {float(end):.1f} s"
            if not packet.size or packet.is_corrupt:  # the last one is empty
                continue
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is stream and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe))
        formats = set(container.format.name.split(","))
        exact = bool(formats & _INDEXED) and stream.codec_context.codec.canonical_name in _ONE_PICTURE_PER_PACKET
        time_base, rate = stream.time_base, stream.average_rate
        declared = Fraction(container.duration or 0, av.time_base) if formats & _DURATION_DECLARED else Fraction(0)
    times = [pts for pts, _, _ in packets]
    if end + _MISSING_SECONDS + (end / len(times) if times else 0) < declared:
        damage = f"it was cut off: {float(declared):.1f} s were written, {float(end):.1f} s are there"
    # Pictures before the first one that decoding can start at do not decode.
    exact = exact and bool(times) and None not in times and len(set(times)) == len(times) and times[0] == min(times)
    if not exact or not packets[0][2]:
        return FrameIndex((), time_base, rate, damage=damage)
    ordered = sorted(times)
    place = {pts: k for k, pts in enumerate(ordered)}
    starts = sorted((place[pts], pts if dts is None else dts) for pts, dts, is_key in packets if is_key)
    return FrameIndex(tuple(ordered), time_base, rate, tuple(starts), damage)


def index_frames(name: str, packets: FrameIndex) -> FrameIndex:
    """The frames that decode, by decoding all; `packets` is what `index_packets` found."""
    times: list[int | None] = []
    damage = packets.damage
    with open_video(name) as (container, stream):
        try:
            for frame in _decode(container, stream):
                times.append(frame.pts)
        except av.FFmpegError as error:
            if not times:
                raise
            damage = damage or f"decoding fails after frame {len(times) - 1}: {error.strerror}"
    return replace(packets, pts=tuple(times), starts=(), damage=damage)


def _demux(container: av.container.InputContainer, *streams: av.stream.Stream) -> Iterator[av.Packet]:
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV's, on a packet of a stream that it did not see when it opened the file
        raise av.error.InvalidDataError(0, "a stream begins in its middle") from None


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in _demux(container, stream):
        if not packet.is_corrupt:  # decoders read ahead: one would fail before it has given what precedes the damage
            yield from packet.decode()


def read_displayed(name: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, int, int]]:
    """The frames `wanted`, ascending without repeats: uint8 RGB `[H, W, 3]` turned as they are displayed, and the
    width and height of their display in square pixels.

    Skips to the last start before a frame where that saves decoding. Raises UnexpectedFrameError where the packets were
    wrong about the frames.
    """
    place = {pts: k for k, pts in enumerate(index.pts)} if index.starts else None
    converter = VideoReformatter()  # one for all: FFmpeg prepares a conversion for longer than it takes
    with open_video(name) as (container, stream):
        frames, position = _decode(container, stream), 0
        for k in wanted:
            after = bisect_right(index.starts, k, key=lambda start: start[0])
            start, dts = index.starts[after - 1] if after else (0, 0)
            if start > position:
                container.seek(dts, stream=stream)
                frames, position = _decode(container, stream), None
            for frame in frames:
                here = position if place is None else place.get(frame.pts)
                if position is None:  # just behind a leap, which may have ended before the start
                    if here is None or here < start:
                        continue
                    position = start
                if here != position:
                    raise UnexpectedFrameError(f"{name}: frame {position} is missing")
                position += 1
                if here == k:
                    break
            else:
                raise UnexpectedFrameError(f"{name}: frame {k} is missing")
            if frame.is_corrupt:
                warnings.warn(f"{name}: frame {k} is damaged", stacklevel=2)
            picture = converter.reformat(frame, format="rgb24").to_ndarray()
            yield _displayed(picture, frame.side_data.get("DISPLAYMATRIX"), stream.sample_aspect_ratio or Fraction(1))


def _displayed(picture: np.ndarray, matrix: object | None, pixel_aspect: Fraction) -> tuple[np.ndarray, int, int]:
    width, height = max(1, round(picture.shape[1] * pixel_aspect)), picture.shape[0]
    if matrix is None:
        return picture, width, height
    # (x, y) is displayed at (a x + c y, b x + d y), up to a shift. Turns that are no quarters go to the nearest one.
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, width, height = picture.transpose(1, 0, 2), height, width
        down, right = b, c
    else:
        down, right = d, a
    picture = picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
    return np.ascontiguousarray(picture), width, height
