"""What is in a synthetic clip, and where at each frame: exact, and without a picture being drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..geometry import Box, TimeSpan, Tube

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple", "white", "pink", "orange", "black")
# Held-out and validation clips are harder: these have at least three objects.
SPLITS = ("train", "validation", "held-out")

# (shape, colour). Two colours of each shape, and two shapes of each of the first six colours, are held out, in a cycle,
# so that each held-out pair shares its colour with one other and its shape with another. The other colours are there so
# that a shape is seen in most of them: with six, models took "red, so no circle" for a rule.
HELD_OUT_PAIRS = tuple((shape, COLOURS[(i + step) % len(SHAPES)]) for i, shape in enumerate(SHAPES) for step in (0, 1))
TRAINING_PAIRS = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT_PAIRS
)

MAX_OBJECTS = 4
_SIDES = (0.15, 0.40)  # of a box, in parts of the picture
_LENGTHS = (0.10, 0.60)  # of a span, in parts of the clip
_ASPECTS = (0.8, 1.25)
_LEAST_TRAVEL = 0.25
# How much of a box others may cover: where it appears and vanishes, and in between.
_COVERED_AT_ENDS, _COVERED = 0.25, 0.5
_ATTEMPTS = 100

_Pair = tuple[str, str]
_Point = tuple[float, float]
_Option = TypeVar("_Option")


@dataclass(frozen=True)
class MovingShape:
    """A coloured shape that appears, moves in one direction, and vanishes.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        direction: `"left"`, `"right"`, `"up"` or `"down"`: where it moves most.
        first: the first frame that it is seen in.
        last: the last one.
        width: of its box, in parts of the picture.
        height: likewise.
        path: three points of a quadratic Bézier curve, on which the top left corner of the box moves: parts of the
            picture. The curve stays within the triangle of its points, and so the box within the picture.
    """

    shape: str
    colour: str
    direction: str
    first: int
    last: int
    width: float
    height: float
    path: tuple[_Point, _Point, _Point]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def visible(self, frame: int) -> bool:
        return self.first <= frame <= self.last

    def box(self, frame: int) -> Box:
        """Its box at a frame that it is seen in, in fractions. The shape touches all four sides."""
        if not self.visible(frame):
            raise ValueError(f"frame: the {self.name} is seen from {self.first} to {self.last}, got {frame}")
        u = (frame - self.first) / (self.last - self.first)
        weights = ((1 - u) ** 2, 2 * u * (1 - u), u**2)
        # `sum` rounds differently from Python 3.12 on.
        left, top = (math.fsum(w * p[axis] for w, p in zip(weights, self.path, strict=True)) for axis in (0, 1))
        return Box(left, top, left + self.width, top + self.height)


@dataclass(frozen=True)
class Background:
    """A gradient between two colours, blotches and grain.

    Attributes:
        colours: where the gradient begins and ends, RGB from 0 to 255.
        direction: of the gradient, horizontally and vertically.
        blotches: how far they are from the gradient at most, of 255.
        grain: likewise.
        noise: seeds what is random in the two.
    """

    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    direction: _Point
    blotches: float
    grain: float
    noise: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A clip.

    Attributes:
        seed: of the data set.
        split: one of `SPLITS`.
        clip: its number in the split.
        frames: how many. Frame k lies at the fraction k / (frames - 1).
        objects: in the order in which they are drawn: later ones cover earlier ones. No two have the same name.
        asked: the index of the object that benchmarks ask about: another object has its colour, and, where there are
            three, a third one its shape.
        other: the index of one of those two; None where the asked one is alone.
        background: behind them.
    """

    seed: int
    split: str
    clip: int
    frames: int
    objects: tuple[MovingShape, ...]
    asked: int
    other: int | None
    background: Background

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.split}-{self.clip:06d}"

    def random(self, purpose: int) -> np.random.Generator:
        """See `generator`; 0 and 1 are taken, by the scene itself and by its background."""
        return generator(self.seed, self.split, self.clip, purpose)

    def fraction(self, frame: int) -> float:
        return frame / (self.frames - 1)

    def span(self, index: int) -> TimeSpan:
        """When an object is in the clip, in fractions: from the first to the last frame that it is seen in."""
        seen = self.objects[index]
        return TimeSpan(self.fraction(seen.first), self.fraction(seen.last))

    def tube(self, index: int, first: int | None = None, last: int | None = None) -> Tube:
        """Where an object is in each frame that it is seen in, or from one of these to another, in fractions."""
        seen = self.objects[index]
        frames = range(seen.first if first is None else first, (seen.last if last is None else last) + 1)
        return Tube(tuple(map(self.fraction, frames)), tuple(map(seen.box, frames)))


def generator(seed: int, split: str, clip: int, purpose: int) -> np.random.Generator:
    """Random numbers for one purpose of one clip. Use `random` and `integers`: their streams stay the same."""
    if seed < 0 or clip < 0:
        raise ValueError(f"seed, clip: expected 0 or more, got {seed} and {clip}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return np.random.default_rng([seed, SPLITS.index(split), clip, purpose])


def make_scene(seed: int, split: str, clip: int, frames: int = 20, objects: tuple[int, int] | None = None) -> Scene:
    """The clip of this number. It depends on the arguments alone, not on clips made before.

    Args:
        seed: of the data set.
        split: `"train"`, whose objects are of `TRAINING_PAIRS`; `"validation"`, likewise, with at least three objects;
            or `"held-out"`, with at least three objects, all of them of `HELD_OUT_PAIRS`.
        clip: its number, from 0.
        frames: how many, 3 at least.
        objects: the least and the largest number of objects; by default 1 to 4 in `"train"`, and else 3 to 4.
    """
    rng = generator(seed, split, clip, purpose=0)
    fewest = 1 if split == "train" else 3
    low, high = objects or (fewest, MAX_OBJECTS)
    if not fewest <= low <= high <= MAX_OBJECTS:
        raise ValueError(f"objects: expected {fewest} <= least <= most <= {MAX_OBJECTS} in {split!r}, got {objects}")
    if frames < 3:
        raise ValueError(f"frames: expected 3 at least, got {frames}")
    known = HELD_OUT_PAIRS if split == "held-out" else TRAINING_PAIRS
    pairs = _choose_pairs(rng, known, int(rng.integers(low, high + 1)))
    order = np.argsort(rng.random(len(pairs)))  # the order of drawing has nothing to do with who is asked about
    shapes = None
    while shapes is None:
        shapes = _place(rng, [pairs[i] for i in order], frames)
    places = {int(pair): place for place, pair in enumerate(order)}
    other = places[1 + int(rng.integers(min(len(pairs) - 1, 2)))] if len(pairs) > 1 else None
    background = _background(rng, (seed, SPLITS.index(split), clip))
    return Scene(seed, split, clip, frames, shapes, places[0], other, background)


def _choose_pairs(rng: np.random.Generator, pairs: tuple[_Pair, ...], count: int) -> list[_Pair]:
    """The asked object's first; then one of its colour, one of its shape (of two, one or the other), and any."""
    chosen = [_draw(rng, pairs)]
    shape, colour = chosen[0]
    same_colour = [pair for pair in pairs if pair[1] == colour and pair != chosen[0]]
    same_shape = [pair for pair in pairs if pair[0] == shape and pair != chosen[0]]
    chosen += [_draw(rng, same_colour), _draw(rng, same_shape)]
    if count == 2 and rng.random() < 0.5:
        del chosen[1]
    chosen.append(_draw(rng, [pair for pair in pairs if pair not in chosen]))
    return chosen[:count]


def _place(rng: np.random.Generator, pairs: list[_Pair], frames: int) -> tuple[MovingShape, ...] | None:
    """Objects none of which hides another, one after the other; None where the next finds no place."""
    placed: list[MovingShape] = []
    for pair in pairs:
        for _ in range(_ATTEMPTS):
            candidate = _move(rng, pair, frames)
            if all(_stays_in_view(shape, [*placed[i + 1 :], candidate]) for i, shape in enumerate(placed)):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def _move(rng: np.random.Generator, pair: _Pair, frames: int) -> MovingShape:
    """An object anywhere, at any time."""
    width = _between(rng, *_SIDES)
    height = min(max(width * _between(rng, *_ASPECTS), _SIDES[0]), _SIDES[1])
    direction = _draw(rng, ("left", "right", "up", "down"))
    along, across = (1 - width, 1 - height) if direction in ("left", "right") else (1 - height, 1 - width)
    travel = _between(rng, _LEAST_TRAVEL, along)
    start = rng.random() * (along - travel)
    ends = (start, start + travel) if direction in ("right", "down") else (start + travel, start)
    # Sideways it moves by less than half as much, so that there is one right name of the direction.
    side = rng.random() * across
    sides = [side, *(_between(rng, max(side - travel / 2, 0), min(side + travel / 2, across)) for _ in range(2))]
    points = list(zip((ends[0], sum(ends) / 2, ends[1]), sides, strict=True))
    if direction in ("up", "down"):
        points = [(x, y) for y, x in points]
    first, last = _span(rng, frames)
    return MovingShape(*pair, direction, first, last, width, height, tuple(points))


def _span(rng: np.random.Generator, frames: int) -> tuple[int, int]:
    """The first and last frame of an object.

    Lengths are uniform. Starts follow the arcsine law: were they uniform, the span from 0.25 to 0.75 or so would be a
    good answer to everything.
    """
    steps = frames - 1
    shortest, longest = max(math.ceil(_LENGTHS[0] * steps - 1e-9), 1), math.floor(_LENGTHS[1] * steps + 1e-9)
    length = int(rng.integers(shortest, longest + 1))
    latest = steps - length
    first = min(int((latest + 1) * math.sin(math.pi / 2 * rng.random()) ** 2), latest)
    return first, first + length


def _stays_in_view(shape: MovingShape, above: list[MovingShape]) -> bool:
    for frame in range(shape.first, shape.last + 1):
        limit = _COVERED_AT_ENDS if frame in (shape.first, shape.last) else _COVERED
        boxes = [other.box(frame) for other in above if other.visible(frame)]
        # Where two of them cover the same part it counts twice: stricter than need be.
        covered = math.fsum(_overlap(shape.box(frame), box) for box in boxes)
        if covered > limit * shape.width * shape.height:
            return False
    return True


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    return max(width, 0.0) * max(height, 0.0)


def _background(rng: np.random.Generator, noise: tuple[int, ...]) -> Background:
    """Greyish and neither black nor white, so that all colours stand out."""
    greys = (_between(rng, 80, 170), _between(rng, 80, 170))
    colours = tuple(tuple(grey + _between(rng, -18, 18) for _ in range(3)) for grey in greys)
    direction = (_between(rng, -1, 1), _between(rng, -1, 1))
    return Background(colours, direction, blotches=_between(rng, 0, 25), grain=_between(rng, 0, 8), noise=noise)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _draw(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    return options[int(rng.integers(len(options)))]
