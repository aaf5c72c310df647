"""Reading data files record by record. An error says which field it is about, what was expected and what came."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

from .samples import Sample

_NUMBER = (int, float)
_LARGEST = 1e300


@dataclass(frozen=True)
class Dataset:
    """What a data file holds.

    Attributes:
        samples: in the order of the file.
        broken: of each record that cannot be used, file, index and reason.
        notes: how the file was understood where it can be understood in several ways.
    """

    samples: tuple[Sample, ...]
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def first(self, limit: int | None) -> list[Sample]:
        """The samples among the file's first `limit` records; all where that is None."""
        return [sample for sample in self.samples if limit is None or sample.index < limit]


def read_json(path: str | PathLike[str]) -> Any:
    """What a file of JSON holds; ValueError where it is none."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_list(path: str | PathLike[str]) -> list[Any]:
    """The records of a file that is one list."""
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, got {type(records).__name__}")
    return records


def make_samples(
    path: str | PathLike[str], records: Sequence[Any], make: Callable[[int, Any], Sample], notes: Sequence[str] = ()
) -> Dataset:
    """Samples of the records by `make(index, record)`; a record for which it raises ValueError is broken."""
    samples, broken = [], []
    for index, record in enumerate(records):
        try:
            samples.append(make(index, record))
        except ValueError as error:
            broken.append(f"{path}, record {index}: {error}")
    return Dataset(tuple(samples), tuple(broken), tuple(notes))


def get(record: Any, name: str) -> Any:
    """The value of a field; `a.b` is the field b of a."""
    for key in name.split("."):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{name}: expected this field, found none")
        record = record[key]
    return record


def get_text(record: Any, name: str) -> str:
    value = get(record, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected text, got {value!r}")
    return value


def get_size(record: Any, name: str) -> float:
    value = number(get(record, name), name)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return value


def number(value: Any, name: str) -> float:
    # Larger integers are no floats, and sums of larger floats are no numbers.
    if not isinstance(value, _NUMBER) or isinstance(value, bool) or not abs(value) < _LARGEST:
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return value


def numbers(value: Any, name: str, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {value!r}")
    return [number(each, name) for each in value]


def edges(value: Any, name: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box `[left, top, width, height]`."""
    left, top, width, height = numbers(value, name, 4)
    if width < 0 or height < 0:
        raise ValueError(f"{name}: expected [left, top, width, height], got {value!r}")
    return left, top, left + width, top + height


def draw(seed: int, index: int, count: int) -> int:
    """A number below `count` that depends on seed and index alone."""
    return Random(f"{seed}:{index}").randrange(count)
