"""What a message consists of: words, items, videos and images, in the order in which the model sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..answer import Answer
from ..coordinate_text import CoordinateText, from_text, literal, write
from ..geometry import Box, Instant, Item, TimeSpan, Tube, change_units
from ..media import Media

KINDS = ("image", "video")
_FRACTIONS = {"fraction": True, "absolute": False, "seconds": False, "pixels": False}
_ITEMS: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "instant": lambda part: Instant(part["time"]),
    "span": lambda part: TimeSpan(part["start"], part["end"]),
    "box": lambda part: Box(*part["box"]),
    "tube": lambda part: Tube(tuple(part["times"]), tuple(Box(*box) for box in part["boxes"])),
}


@dataclass(frozen=True, eq=False)
class Shown:
    """A video or an image in a prompt.

    Attributes:
        media: what is known of it.
        pixels: `[T, 3, S, S]`; None where it is encoded already.
        streams: visual tokens of each block that stands for it.
    """

    media: Media
    pixels: Tensor | None
    streams: tuple[int, ...]


class _Words(CoordinateText):
    """Words in which nothing stands for anything."""


class _Placed(NamedTuple):
    item: Item
    in_fractions: bool


_Piece = CoordinateText | Shown | _Placed


def read_content(
    content: Any,
    side: str,
    load: Callable[[Mapping[str, Any]], Shown],
    current: Media | None = None,
    unit: str = "absolute",
    coordinates: bool = True,
) -> list[CoordinateText | Shown]:
    """The texts, with positions, and the media of a message, in the order in which the model sees them.

    A single video or image comes first, followed by a new line, as published; several stay where they are, each
    followed by a new line. Where texts have as many `<image>` or `<video>` in them as there are images or videos, these
    go there, and new lines are up to the text.

    Args:
        content: a string, a `CoordinateText`, an `Answer`, or a list of parts (see
            `LlavaStProcessor.apply_chat_template`).
        side: `"input"` or `"output"`, of template tokens.
        load: makes a `Shown` of a video or image part.
        current: what seconds and pixels before any video or image of this message refer to.
        unit: of items that do not say: `"absolute"`, seconds and pixels, or `"fraction"`.
        coordinates: whether texts that do not say are searched for coordinates.

    Raises:
        ValueError: for parts that make no sense; the message says which.
    """
    parts = [content] if isinstance(content, str | CoordinateText | Answer) else content
    if not isinstance(parts, Sequence):
        raise ValueError(f"content: expected a string or a list of parts, got {type(content).__name__}")
    pieces = _arrange(_fill_placeholders([_piece(part, side, load, unit, coordinates) for part in parts]))
    result: list[CoordinateText | Shown] = []
    words: list[Item | CoordinateText] = []
    for piece in pieces:
        if isinstance(piece, Shown):
            result += [write(words, side), piece]
            words, current = [], piece.media
        else:
            words.append(_to_fractions(piece, current) if isinstance(piece, _Placed) else piece)
    return [*result, write(words, side)]


def _piece(part: Any, side: str, load: Callable[[Mapping[str, Any]], Shown], unit: str, coordinates: bool) -> _Piece:
    if isinstance(part, str):
        return from_text(part, side) if coordinates else _Words(literal(part).text)
    if isinstance(part, CoordinateText):
        return part
    if isinstance(part, Answer):
        if part.written is None:
            raise ValueError("content: an Answer can be said again where it has what the model wrote (Answer.written)")

        text = part.written.text if side == "output" else part.written.text.replace("-OUTPUT>", "-INPUT>")
        return CoordinateText(text, part.written.positions)
    if isinstance(part, Item):
        return _Placed(part, _in_fractions(unit))
    kind = part.get("type") if isinstance(part, Mapping) else None
    try:
        if kind == "text":
            return _piece(part["text"], side, load, unit, part.get("coordinates", coordinates))
        if kind in KINDS:
            return load(part)
        if kind in _ITEMS:
            return _Placed(_ITEMS[kind](part), _in_fractions(part.get("unit", unit)))
    except KeyError as error:
        raise ValueError(f"content: a part of type {kind!r} needs {error}, got {sorted(part)}") from None
    except TypeError as error:
        raise ValueError(f"content: a part of type {kind!r} is malformed: {error}") from error
    expected = ", ".join(repr(name) for name in ("text", *KINDS, *_ITEMS))
    got = f"the type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"content: expected parts that are strings, items or dicts of the types {expected}, got {got}")


def _fill_placeholders(pieces: list[_Piece]) -> list[tuple[_Piece, bool]]:
    """The pieces with media where texts have placeholders for them, and whether each is there for that reason."""
    filled = [(piece, False) for piece in pieces]
    for kind in KINDS:
        media = [piece for piece in pieces if isinstance(piece, Shown) and piece.media.kind == kind]
        count = sum(piece.text.count(f"<{kind}>") for piece in pieces if _may_place(piece))
        if not media or not count:  # without media these are words like all others
            continue
        if count != len(media):
            raise ValueError(f"content: expected as many <{kind}> in the text as {kind}s, got {count} and {len(media)}")
        waiting = iter(media)
        spread: list[tuple[_Piece, bool]] = []
        for piece, placed in filled:
            if _may_place(piece):
                for i, text in enumerate(piece.split(f"<{kind}>")):
                    spread.append((next(waiting), True) if i % 2 else (text, False))
            elif piece not in media:
                spread.append((piece, placed))
        filled = spread
    return [(piece, placed) for piece, placed in filled if not isinstance(piece, CoordinateText) or piece.text]


def _may_place(piece: _Piece) -> bool:
    """Whether it is text with places for media in it."""
    return isinstance(piece, CoordinateText) and not isinstance(piece, _Words)


def _arrange(pieces: list[tuple[_Piece, bool]]) -> list[_Piece]:
    """The pieces with a single video or image in front, and new lines behind those that were not in the text."""
    media = [i for i, (piece, _) in enumerate(pieces) if isinstance(piece, Shown)]
    if len(media) == 1 and media[0] > 0:
        rest = [piece for i, (piece, _) in enumerate(pieces) if i != media[0]]
        rest[0] = _strip(rest[0], str.lstrip)
        rest[-1] = _strip(rest[-1], str.rstrip)
        return [pieces[media[0]][0], CoordinateText("\n"), *rest]
    result: list[_Piece] = []
    for i, (piece, placed) in enumerate(pieces):
        result.append(piece)
        if isinstance(piece, Shown) and not placed and i + 1 < len(pieces):
            following = pieces[i + 1][0]
            if not (isinstance(following, CoordinateText) and following.text.startswith("\n")):
                result.append(CoordinateText("\n"))
    return result


def _strip(piece: _Piece, strip: Callable[[str], str]) -> _Piece:
    return CoordinateText(strip(piece.text), piece.positions) if isinstance(piece, CoordinateText) else piece


def _in_fractions(unit: str) -> bool:
    if unit not in _FRACTIONS:
        raise ValueError(f"unit: expected one of {', '.join(map(repr, _FRACTIONS))}, got {unit!r}")
    return _FRACTIONS[unit]


def _to_fractions(placed: _Placed, media: Media | None) -> Item:
    """The item in fractions. What reaches over the edge of the picture or clip ends there."""
    item = change_units(placed.item, *[_finite] * 3)
    if placed.in_fractions:
        return change_units(item, *[_within] * 3)
    if media is None:
        raise ValueError(f"content: {item} is in seconds or pixels, but no video or image comes before it")
    if media.kind == "image" and not isinstance(item, Box):
        raise ValueError(f"content: {item} has a time, but what comes before it is an image; give it in fractions")
    _check_inside(item, media)
    return change_units(media.to_fractions(item), *[lambda value: min(max(value, 0.0), 1.0)] * 3)


def _check_inside(item: Item, media: Media) -> None:
    """That some of an item, in seconds and pixels, is in the clip and the picture, and no end is before its start."""
    times: list[tuple[float, float]] = []
    if isinstance(item, TimeSpan):
        times = [(item.start, item.end)]
    elif isinstance(item, Instant | Tube):
        times = [(time, time) for time in (item.times if isinstance(item, Tube) else (item.time,))]
    boxes = item.boxes if isinstance(item, Tube) else [item] if isinstance(item, Box) else []
    ranges = [(start, end, media.timestamps[0], media.timestamps[-1], "s") for start, end in times]
    ranges += [(box.left, box.right, 0, media.width, "pixels") for box in boxes]
    ranges += [(box.top, box.bottom, 0, media.height, "pixels") for box in boxes]
    for start, end, first, last, unit in ranges:
        if end < start:
            raise ValueError(f"content: {item} ends before it starts")
        if end < first or start > last:
            raise ValueError(f"content: {item} lies outside of what is shown, {first:g} to {last:g} {unit}")


def check_unchanged(kind: str, part: Mapping[str, Any]) -> None:
    """That for a video or image that is loaded already no other frames of it are asked for."""
    for name in ("clip", "num_frames", "fps"):
        if part.get(name) is not None:
            raise ValueError(f"content: {name} is for files; this {kind} has been loaded already")


def _finite(value: float) -> float:
    try:
        finite = math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or none that a float holds
        finite = False
    if not finite:
        raise ValueError(f"content: expected finite coordinates, got {value!r:.80}")
    return value


def _within(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"content: expected fractions from 0 to 1, got {value}")
    return value
