"""Scenes to frames, and frames to files."""

from __future__ import annotations

from functools import lru_cache
from os import PathLike, fspath

import av
import numpy as np

from .scenes import Background, Scene

RGB = {
    "red": (215, 40, 40),
    "yellow": (235, 215, 45),
    "green": (40, 170, 60),
    "cyan": (60, 215, 225),
    "blue": (45, 70, 215),
    "purple": (175, 50, 205),
    "white": (250, 250, 250),
    "pink": (250, 150, 190),
    "orange": (240, 130, 30),
    "black": (5, 5, 5),
}
_MASK = 240  # cells of a shape's drawing, each way
_BLOTCHES = 6  # each way

# H.264 where PyAV's FFmpeg has libx264, which its wheels do. Both at a quality that leaves edges and colours alone.
_CODECS = (
    ("libx264", {"preset": "veryfast", "crf": "14", "bf": "0", "tune": "fastdecode"}),
    ("mpeg4", {"qmin": "2", "qmax": "3"}),
)


def render(scene: Scene, size: int = 96) -> np.ndarray:
    """All frames of a scene, uint8 RGB `[frames, size, size, 3]`."""
    background = _paint(scene.background, size)
    return np.stack([_draw(scene, frame, background) for frame in range(scene.frames)])


def render_frame(scene: Scene, frame: int, size: int = 96) -> np.ndarray:
    """One frame of a scene, uint8 RGB `[size, size, 3]`."""
    return _draw(scene, frame, _paint(scene.background, size))


def write_video(path: str | PathLike[str], frames: np.ndarray, fps: int = 10) -> None:
    """An mp4 file of uint8 RGB frames `[T, H, W, 3]`, H and W even: H.264 or else MPEG-4, yuv420p.

    The same frames make the same file on the same build of FFmpeg: one thread encodes.
    """
    codec, options = next((name, options) for name, options in _CODECS if name in av.codecs_available)
    with av.open(fspath(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _draw(scene: Scene, frame: int, background: np.ndarray) -> np.ndarray:
    picture = background.copy()
    size = len(picture)
    for shape in scene.objects:
        if shape.visible(frame):
            box = shape.box(frame)
            rows, share_y = _cells(box.top, box.bottom, size)
            columns, share_x = _cells(box.left, box.right, size)
            covered = _coverage(shape.shape, share_y, share_x)[..., None]
            part = picture[rows, columns]
            part += covered * (np.array(RGB[shape.colour], np.float32) - part)
    return np.rint(picture).astype(np.uint8)


def _cells(low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels that a side of a box meets, and their edges in parts of the side, from 0 to 1."""
    first, last = int(np.floor(low * size)), int(np.ceil(high * size))
    edges = np.arange(first, last + 1) / size
    return slice(first, last), np.clip((edges - low) / (high - low), 0.0, 1.0)


def _coverage(shape: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, exactly but for the cells of its drawing.

    Args:
        shape: which.
        rows: edges of pixels in parts of the box's height.
        columns: edges of pixels in parts of the box's width.
    """
    sums = _summed(shape)
    low, weight = _split(rows)
    across = sums[low] * (1 - weight[:, None]) + sums[low + 1] * weight[:, None]
    low, weight = _split(columns)
    area = across[:, low] * (1 - weight) + across[:, low + 1] * weight
    inner = np.diff(np.diff(area, axis=0), axis=1)
    # Of whole pixels: those at the border reach beyond the box.
    whole = np.diff(rows).max() * np.diff(columns).max() * _MASK**2
    return (inner / whole).astype(np.float32)


def _split(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum((edges * _MASK).astype(int), _MASK - 1)
    return low, edges * _MASK - low


@lru_cache
def _summed(shape: str) -> np.ndarray:
    """Of a shape's drawing, how many cells above and left of each corner belong to it: `[cells + 1, cells + 1]`."""
    sums = np.zeros((_MASK + 1, _MASK + 1))
    sums[1:, 1:] = _drawing(shape).cumsum(0).cumsum(1)
    return sums


def _drawing(shape: str) -> np.ndarray:
    """Whether each cell of a box belongs to the shape that fills it: bool `[cells, cells]`."""
    ticks = (np.arange(_MASK) + 0.5) / _MASK
    x, y = np.meshgrid(ticks, ticks)
    radius = np.hypot(x - 0.5, y - 0.5)
    if shape == "circle":
        return radius <= 0.5
    if shape == "ring":
        return (radius <= 0.5) & (radius >= 0.28)
    if shape == "square":
        return np.ones_like(x, bool)
    if shape == "cross":
        return (abs(x - 0.5) <= 0.15) | (abs(y - 0.5) <= 0.15)
    if shape == "triangle":
        return abs(x - 0.5) <= y / 2
    if shape == "star":
        return _star(x, y)
    raise ValueError(f"shape: expected a known one, got {shape!r}")


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points, one upwards, stretched to its box."""
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.42, 1.0)
    corners = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    corners = (corners - corners.min(0)) / np.ptp(corners, axis=0)
    inside = np.zeros_like(x, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:  # each edge that a ray to the right crosses
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside


def _paint(background: Background, size: int) -> np.ndarray:
    """float32 `[size, size, 3]`, from 0 to 255."""
    rng = np.random.default_rng([*background.noise, 1])
    ticks = np.linspace(-1, 1, size)
    dx, dy = background.direction
    slope = (dx * ticks[None, :] + dy * ticks[:, None]) / max(abs(dx) + abs(dy), 1e-6) / 2 + 0.5
    begin, end = np.array(background.colours)
    spread = _spread(size)
    blotches = spread @ (2 * rng.random((_BLOTCHES, _BLOTCHES)) - 1) @ spread.T
    grain = 2 * rng.random((size, size)) - 1
    light = background.blotches * blotches + background.grain * grain
    return (begin + slope[..., None] * (end - begin) + light[..., None]).astype(np.float32)


def _spread(size: int) -> np.ndarray:
    """Linear interpolation from blotches to pixels, `[size, blotches]`."""
    at = np.linspace(0, _BLOTCHES - 1, size)
    return np.maximum(1 - abs(at[:, None] - np.arange(_BLOTCHES)), 0)
