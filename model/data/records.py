"""Records as published: what is wrong with one, and the conversation that it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ..configuration_llava_st import TEMPLATE_TOKENS
from ..coordinate_text import VARIABLES, CoordinateText, from_variables, read, write
from ..media import stays_inside
from ..prompting.content import KINDS

ROLES = {"human": "user", "gpt": "assistant"}
# What can be wrong with a record.
PROBLEMS = (
    "not JSON",
    "missing key",
    "wrong type",
    "unknown role",
    "order of turns",
    "placeholders",
    "positions",
    "range",
    "start after end",
    "media missing",
    "media undecodable",
)

Record = Mapping[str, Any]
Message = dict[str, Any]
_SPELLED = re.compile(r"<(?:TEMP|HEIGHT|WIDTH)-(?:INPUT|OUTPUT)[^<>]{1,40}>")
_INPUTS = [token for kind, token in TEMPLATE_TOKENS.items() if kind.endswith("input")]


class Problem(NamedTuple):
    """What is wrong with a record: one of `PROBLEMS`, and where, what was expected and what came."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class RecordError(ValueError):
    """A record that cannot be trained on. The message says all that is wrong with it."""


def find_problems(
    record: Any, folder: str | PathLike[str] | None = None, load: Callable[[Message], Any] | None = None
) -> list[Problem]:
    """All that is wrong with a record, whatever it is.

    Args:
        record: what JSON gave.
        folder: where its videos and images are, and none outside of it; None: they may be anywhere.
        load: is called with each of these, a part of a message, and raises where one cannot be used. None: they are not
            looked at.
    """
    if not isinstance(record, Mapping):
        return [Problem("wrong type", f"expected a record, {{...}}, got {_show(record)}")]
    turns, media = list(_of_turns(record)), list(_of_media(record, folder))
    readable = all(problem.kind == "order of turns" for problem in turns)
    placeholders = list(_of_placeholders(record)) if readable and not media else []
    positions = list(_of_positions(record)) or list(_of_items(record)) if readable else []
    files = [] if media or load is None else list(_of_files(record, folder or "", load))
    return [*turns, *media, *placeholders, *positions, *files]


def to_conversation(record: Record, folder: str | PathLike[str] = "") -> list[Message]:
    """A record as a conversation that `LlavaStProcessor` takes.

    Args:
        record: as published (docs/data.md).
        folder: where its videos and images are.

    Raises:
        RecordError: for one that `find_problems` finds something wrong with.
    """
    if problems := find_problems(record, folder):
        raise RecordError("; ".join(map(str, problems)))
    waiting = {kind: iter(media_parts(record, folder, kind)) for kind in KINDS}
    conversation = []
    for role, text in turns_of(record):
        shown = [next(waiting[kind]) for kind in KINDS for _ in range(text.text.count(f"<{kind}>"))]
        conversation.append({"role": ROLES[role], "content": [*shown, text]})
    return conversation


def turns_of(record: Record) -> list[tuple[str, CoordinateText]]:
    """Who says what, with positions, of a record that is as it should be."""
    turns = record["conversations"]
    texts = from_variables([turn["value"] for turn in turns], record.get("variables") or {})
    return [(turn["from"], text) for turn, text in zip(turns, texts, strict=True)]


def media_parts(record: Record, folder: str | PathLike[str], *kinds: str) -> list[Message]:
    """The videos and images of a record, as parts of a message."""
    split = (record.get("meta") or {}).get("split")
    parts: list[Message] = []
    for kind in kinds or KINDS:
        names = record.get(kind) or []
        for name in [names] if isinstance(names, str) else names:
            parts.append({"type": kind, kind: str(Path(folder, name))})
            if kind == "video" and split:
                parts[-1]["clip"] = (int(split[0]), int(split[1]))
    return parts


def task_of(record: Any, default: str) -> str:
    """The name of a record's task: its type, where it says one."""
    name = record.get("type") if isinstance(record, Mapping) else None
    return name if isinstance(name, str) and name.isprintable() and name else default


def has_coordinates(record: Any) -> bool:
    """Whether a record has coordinates in what is said."""
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return any(token in text for text in texts if isinstance(text, str) for token in TEMPLATE_TOKENS.values())


def _of_turns(record: Record) -> Iterator[Problem]:
    if "conversations" not in record:
        yield Problem("missing key", "conversations")
        return
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        yield Problem("wrong type", f"conversations: expected a list of turns, got {_show(turns)}")
        return
    well_formed = True
    for number, turn in enumerate(turns):
        place = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            yield Problem("wrong type", f"{place}: expected from and value, got {_show(turn)}")
            well_formed = False
            continue
        for key in ("from", "value"):
            if key not in turn:
                yield Problem("missing key", f"{place}.{key}")
                well_formed = False
        if "from" in turn and not (isinstance(turn["from"], str) and turn["from"] in ROLES):
            yield Problem("unknown role", f"{place}.from: expected human or gpt, got {_show(turn['from'])}")
            well_formed = False
        if "value" in turn and not (isinstance(turn["value"], str) and _is_text(turn["value"])):
            yield Problem("wrong type", f"{place}.value: expected text, got {_show(turn['value'])}")
        elif turn.get("from") == "gpt" and "value" in turn and not turn["value"].strip():
            yield Problem("wrong type", f"{place}.value: expected an answer, got {_show(turn['value'])}")
    if well_formed:
        roles = [turn["from"] for turn in turns]
        for number, role in enumerate(roles):
            expected = ("human", "gpt")[number % 2]
            if role != expected:
                yield Problem("order of turns", f"conversations[{number}].from: expected {expected}, got {role}")
                return
        if len(roles) % 2:
            yield Problem("order of turns", f"conversations: expected gpt to speak last, got {roles[-1]}")


def _of_media(record: Record, folder: str | PathLike[str] | None) -> Iterator[Problem]:
    for kind in KINDS:
        names = record.get(kind)
        listed = [names] if isinstance(names, str) else [] if names is None else names
        if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
            yield Problem("wrong type", f"{kind}: expected a file, or a list of files, got {_show(names)}")
        elif any("\0" in name or not _is_text(name) for name in listed):
            yield Problem("wrong type", f"{kind}: expected names of files, got {_show(names)}")
        elif folder is not None and not all(stays_inside(name, folder) for name in listed):
            yield Problem("wrong type", f"{kind}: expected files in the folder of media, {folder}, got {_show(names)}")
    meta = record.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        yield Problem("wrong type", f"meta: expected an object, got {_show(meta)}")
    elif (split := (meta or {}).get("split")) is not None:
        if not isinstance(split, list) or len(split) != 2 or not all(_is_number(x) and x == int(x) for x in split):
            yield Problem("wrong type", f"meta.split: expected the first and the last frame, got {_show(split)}")
        elif split[0] < 0:
            yield Problem("range", f"meta.split: expected frames from 0, got {_show(split)}")
        elif split[0] > split[1]:
            yield Problem("start after end", f"meta.split: {_show(split)}")


def _of_placeholders(record: Record) -> Iterator[Problem]:
    for kind in KINDS:
        count, shown = len(media_parts(record, "", kind)), 0
        for number, turn in enumerate(record["conversations"]):
            here = turn["value"].count(f"<{kind}>")
            shown += here
            if here and turn["from"] == "gpt":
                yield Problem("placeholders", f"conversations[{number}].value: gpt shows no {kind}, got <{kind}>")
        if shown != count:
            yield Problem("placeholders", f"expected as many <{kind}> in the turns as {kind}s, {count}, got {shown}")


def _of_positions(record: Record) -> Iterator[Problem]:
    variables = record.get("variables")
    if variables is not None and not isinstance(variables, Mapping):
        yield Problem("wrong type", f"variables: expected lists of positions by name, got {_show(variables)}")
        return
    variables = variables or {}
    texts = [turn["value"] for turn in record["conversations"]]
    for number, turn in enumerate(record["conversations"]):
        if spelled := _SPELLED.search(turn["value"]):
            message = f"conversations[{number}].value: {spelled[0]} has its number inside of the token"
            yield Problem("positions", f"{message}; `convert --to tokens` makes variables of it")
        if turn["from"] == "gpt" and any(token in turn["value"] for token in _INPUTS):
            message = f"conversations[{number}].value: expected OUTPUT tokens from gpt, got INPUT ones"
            yield Problem("positions", message)
    for token, name in VARIABLES.items():
        values = variables.get(name)
        values = [] if values is None else values
        if not isinstance(values, list):
            yield Problem("wrong type", f"variables.{name}: expected a list of numbers, got {_show(values)}")
            continue
        expected = sum(text.count(token) for text in texts)
        if len(values) != expected:
            few = "few" if len(values) < expected else "many"
            message = f"too {few} in variables.{name}: {len(values)} for {expected} {token}"
            yield Problem("positions", message)
        for index, value in enumerate(values):
            if not _is_number(value):
                yield Problem("wrong type", f"variables.{name}[{index}]: expected a number, got {_show(value)}")
                break
            if not 0 <= value <= 1:
                yield Problem("range", f"variables.{name}[{index}]: expected 0 to 1, got {_show(value)}")
                break
    if unknown := [name for name in variables if name not in VARIABLES.values()]:
        yield Problem("positions", f"variables: unknown list {_show(unknown[0])}")


def _of_items(record: Record) -> Iterator[Problem]:
    for number, (_, text) in enumerate(turns_of(record)):
        if text.positions:
            for item in read(text).parts:
                if not isinstance(item, str):
                    # Read by itself, an item has no other problems than contradictions.
                    for problem in read(write([item], "input")).problems:
                        yield Problem("start after end", f"conversations[{number}].value: {problem}")


def _of_files(record: Record, folder: str | PathLike[str], load: Callable[[Message], Any]) -> Iterator[Problem]:
    for part in media_parts(record, folder):
        try:
            load(part)
        except FileNotFoundError as error:
            yield Problem("media missing", str(error))
        except Exception as error:  # decoders raise whatever they like
            yield Problem("media undecodable", str(error))


def _is_number(value: Any) -> bool:
    """Whether something is a number that a float can be; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(text: str) -> bool:
    """Whether all of a string is characters: JSON can have halves of them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    shown = repr(value) if not isinstance(value, list | Mapping) or len(value) < 20 else f"{str(value)[:60]}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
