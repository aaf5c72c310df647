"""Coordinates of records as plain numbers in the text, or as template tokens with lists of positions."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from ..coordinate_text import CoordinateText, from_text, plain, read, spell_out, to_variables
from .files import Found, find_records, is_lines, parse
from .records import Record, RecordError, find_problems, has_coordinates, turns_of

FORMS = ("tokens", "numbers")
_SIDES = {"human": "input", "gpt": "output"}


class AmbiguousError(ValueError):
    """Numbers in the place of a record's coordinates would not be read as the same coordinates."""


def to_tokens(record: Record) -> Record:
    """A record whose coordinates are numbers in the text (see `from_text`), with template tokens and `variables`.

    One that has template tokens stays as it is.

    Raises:
        RecordError: the record is broken, or its coordinates are.
    """
    written = has_coordinates(record)
    if problems := [each for each in find_problems(record) if written or each.kind != "positions"]:
        raise RecordError("; ".join(map(str, problems)))
    if written:
        return record
    try:
        texts = [from_text(turn["value"], _SIDES[turn["from"]]) for turn in record["conversations"]]
    except ValueError as error:
        raise RecordError(f"positions: {error}") from None
    converted = {**_with_texts(record, [text.text for text in texts]), "variables": to_variables(texts)}
    if problems := find_problems(converted):
        raise RecordError("; ".join(map(str, problems)))
    return converted


def to_numbers(record: Record, decimals: int = 3) -> Record:
    """The inverse of `to_tokens`, but for rounding and for spaces beside boxes and spans.

    A turn whose numbers would not be read as the same coordinates, such as a point in time in the middle of a sentence,
    has them inside of the tokens: `<TEMP-INPUT0.591>`.

    Raises:
        RecordError: the record is broken.
        AmbiguousError: in neither form would the numbers be read as they were meant.
    """
    if problems := find_problems(record):
        raise RecordError("; ".join(map(str, problems)))
    texts = [_numbers(text, _SIDES[role], decimals) for role, text in turns_of(record)]
    if not has_coordinates(record):
        return record
    return {key: value for key, value in _with_texts(record, texts).items() if key != "variables"}


def convert_file(
    source: str | PathLike[str],
    target: str | PathLike[str],
    to: str,
    decimals: int = 3,
    report: Callable[[str], Any] = print,
) -> Counter[str]:
    """Converts a file of records. Names say which is a list and which has lines; both may be the same file.

    Args:
        source: what to read.
        target: what to write. It is there, or replaced, once it is complete.
        to: `"tokens"` or `"numbers"`.
        decimals: of numbers.
        report: is told of each record that is not converted, with file and line. Such a record is copied, or left out
            where it is not JSON.

    Returns:
        How many were `"converted"`, are `"ambiguous"` or `"broken"`.
    """
    if to not in FORMS:
        raise ValueError(f"to: expected one of {', '.join(FORMS)}, got {to!r}")
    change = to_tokens if to == "tokens" else partial(to_numbers, decimals=decimals)
    counts: Counter[str] = Counter()
    with _replacing(Path(target)) as file:
        separator = b"" if is_lines(target) else b"[\n"
        for found in find_records(source):
            outcome, record, reason = _convert(found, change)
            counts[outcome] += 1
            if reason:
                report(f"{source}:{found.line}: {reason}")
            if record is not None:
                # Halves of characters, which only escapes can write.
                file.write(separator + json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace"))
                separator = b"\n" if is_lines(target) else b",\n"
        if not is_lines(target):
            file.write(b"\n]\n" if separator != b"[\n" else b"[]\n")
        elif separator:
            file.write(b"\n")
    return counts


def _convert(found: Found, change: Callable[[Record], Record]) -> tuple[str, Any, str]:
    """What becomes of a record: a word for it, the new record, and what is wrong with it."""
    try:
        record = parse(found.text, found.line)
    except ValueError as error:
        return "broken", None, found.problem or f"not JSON: {error}"
    if found.problem:
        return "broken", record, found.problem
    try:
        return "converted", change(record), ""
    except AmbiguousError as error:
        return "ambiguous", record, str(error)
    except RecordError as error:
        return "broken", record, str(error)


def _numbers(text: CoordinateText, side: str, decimals: int) -> str:
    """The text with numbers that are read as the positions of its tokens."""
    rounded = CoordinateText(text.text, tuple(round(position, decimals) for position in text.positions))
    for written in (plain(text, decimals), spell_out(rounded)):
        try:
            back = from_text(written, side)
        except ValueError:
            continue
        if read(back) == read(rounded) and to_variables([back]) == to_variables([rounded]):
            return written
    raise AmbiguousError(f"numbers would be read as other coordinates: {plain(text, decimals)[:80]!r}")


def _with_texts(record: Record, texts: list[str]) -> dict[str, Any]:
    turns = [{**turn, "value": text} for turn, text in zip(record["conversations"], texts, strict=True)]
    return {**record, "conversations": turns}


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when all has been written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
