"""Which records make a training set: YAML that names files of records, their folders of media, and how many to take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..yaml_files import read_yaml
from .order import shuffled

_STRATEGY = re.compile(r"(?P<kind>first|end|random):(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)")
_KEYS = ("json_path", "data_folder", "source", "sampling_strategy")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAX_ALTERNATIVES = 10_000


@dataclass(frozen=True)
class Strategy:
    """Which records of a file are taken: `all`, `first:N`, `end:N` or `random:N`; N may be a percentage, `10%`."""

    text: str = "all"

    def __post_init__(self) -> None:
        match = _STRATEGY.fullmatch(self.text)
        if self.text != "all" and (match is None or (not match["percent"] and "." in match["amount"])):
            raise ValueError(
                "sampling_strategy: expected all, first:N, end:N or random:N, N being a number or a percentage such as "
                f"10%, got {self.text!r}"
            )

    def choose(self, size: int, *key: int | str) -> range | np.ndarray:
        """The indices, ascending; random ones depend on `key`. Shares are rounded up; more than there are is all."""
        match = _STRATEGY.fullmatch(self.text)
        if match is None:
            return range(size)
        amount = Fraction(match["amount"])
        count = min(math.ceil(amount * size / 100 if match["percent"] else amount), size)
        if match["kind"] == "random":
            return np.sort(shuffled(size, *key)[:count])
        return range(count) if match["kind"] == "first" else range(size - count, size)


@dataclass(frozen=True)
class Source:
    """A file of records.

    Attributes:
        file: the file, `.jsonl` with a record on each line, or else one list.
        folder: where videos and images are.
        strategy: which of its records are taken.
        name: of the source, the task of records that do not say theirs.
    """

    file: Path
    folder: Path
    strategy: Strategy = Strategy()
    name: str = ""

    def choose(self, size: int, seed: int) -> range | np.ndarray:
        """The indices of the records that are taken of `size`."""
        return self.strategy.choose(size, seed, self.file.name)


def read_sources(data: str | PathLike[str], folder: str | PathLike[str] | None = None) -> list[Source]:
    """The sources of a training set.

    Args:
        data: `.yaml`, with `datasets: [{json_path, data_folder, sampling_strategy, source}, ...]`, of which the last
            two may be missing; or a file of records. Names of files may have alternatives in braces, `part-{a,b}.json`.
        folder: of the media where `data` is not YAML; by default the file's own.

    Relative names in YAML are looked for beside the YAML first, then where the program runs, as published.

    Raises:
        ValueError: YAML of another form; says which entry.
        FileNotFoundError: a file or a folder is not there.
    """
    path = Path(data)
    if path.suffix.lower() not in (".yaml", ".yml"):
        files = [_existing(Path(name)) for name in _alternatives(str(data))]
        return [Source(file, Path(folder) if folder else file.parent, name=file.stem) for file in files]
    if folder is not None:
        raise ValueError(f"folder: expected none beside YAML, which says data_folder, got {folder}")
    sources = []
    for number, entry in enumerate(_entries(path), start=1):
        try:
            sources += _sources(entry, path.parent)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{path}, dataset {number}: {error}") from None
    return sources


def _entries(path: Path) -> Sequence[Any]:
    content = read_yaml(path)
    entries = content.get("datasets") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected `datasets:` and a list of entries, got {content!r:.80}")
    return entries


def _sources(entry: Any, beside: Path) -> list[Source]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected json_path, data_folder, ..., got {entry!r:.80}")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise ValueError(f"{unknown[0]}: there is no such key. There are {', '.join(_KEYS)}")
    for key in ("json_path", "data_folder"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{key}: expected a path, got {entry.get(key)!r}")
    strategy = Strategy(str(entry.get("sampling_strategy", "all")))
    folder = _existing(Path(entry["data_folder"]), beside)
    files = [_existing(Path(name), beside) for name in _alternatives(entry["json_path"])]
    return [Source(file, folder, strategy, str(entry.get("source") or file.stem)) for file in files]


def _alternatives(name: str) -> list[str]:
    """`a{b,c}` as `ab` and `ac`."""
    pieces = _BRACES.split(name)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if (count := math.prod(map(len, choices))) > _MAX_ALTERNATIVES:
        raise ValueError(f"{name[:80]!r}: braces may stand for at most {_MAX_ALTERNATIVES} names, got {count}")
    return ["".join(choice) for choice in product(*choices)]


def _existing(path: Path, beside: Path = Path()) -> Path:
    for candidate in (beside / path, path):
        if candidate.exists():
            return candidate
    places = " or ".join(dict.fromkeys(map(str, (beside / path, path))))
    raise FileNotFoundError(f"{places}: not there")
