"""All records of a training set by index, in memory that does not grow with them.

What is kept of a file is a table of Arrow, memory-mapped by Hugging Face `datasets`: where each record begins, how long
it is, its line and its task. Records stay in their file as they are, whatever keys they have, and are read there.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .files import find_records, is_lines, parse
from .records import task_of
from .sources import Source

# A table that another version made is not used.
_VERSION = 1
_FEATURES = datasets.Features(
    {
        "offset": datasets.Value("int64"),
        "length": datasets.Value("int32"),
        "line": datasets.Value("int64"),
        "task": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)
_BATCH = 10_000


class Entry(NamedTuple):
    """A record of a training set.

    Attributes:
        source: where it comes from.
        index: its place in the source's file, from 0.
        line: its first line there, from 1.
        task: the name of its task.
        text: its bytes.
        problem: what is wrong with the file there; see `Found`.
    """

    source: Source
    index: int
    line: int
    task: str
    text: bytes
    problem: str

    @property
    def place(self) -> str:
        """File and line, and the index in a list, all of which may be one line."""
        where = f"{self.source.file}:{self.line}"
        return where if is_lines(self.source.file) else f"{where} (record {self.index})"

    def record(self) -> Any:
        """What the text says.

        Raises:
            ValueError: it is not JSON.
        """
        return parse(self.text, self.line)


class RecordTable(Sequence[Entry]):
    """The records of sources, one source after another.

    Args:
        sources: where they come from.
        seed: of the records that `random:N` takes.
        cache_dir: where tables are kept for the next time; by default where `datasets` keeps its own. The first of
            several processes makes them, and the others wait. A file that changed gets a new one.
        everything: takes all records, whatever the sources' strategies say.

    Raises:
        ValueError: a file is no list of records.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int = 0,
        cache_dir: str | PathLike[str] | None = None,
        everything: bool = False,
    ) -> None:
        self.sources = list(sources)
        files = dict.fromkeys(source.file for source in sources)
        self._stamps = {file: _stamp(file) for file in files}
        places = {file: _places(file, self._stamps[file], cache_dir) for file in files}
        self._chosen = [
            range(len(places[source.file])) if everything else source.choose(len(places[source.file]), seed)
            for source in sources
        ]
        self._places = [places[source.file] for source in sources]
        self._ends = list(accumulate(map(len, self._chosen)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        """The record of an index.

        Raises:
            RuntimeError: its file has changed since the table was made.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = bisect_right(self._ends, index)
        place = index - self._ends[number] + len(self._chosen[number])
        return next(self._read(number, slice(place, place + 1)))

    def __iter__(self) -> Iterator[Entry]:
        for number, chosen in enumerate(self._chosen):
            for start in range(0, len(chosen), _BATCH):
                yield from self._read(number, slice(start, start + _BATCH))

    def tasks(self) -> Counter[str]:
        """How many records each task has."""
        counts: Counter[str] = Counter()
        for source, chosen, places in zip(self.sources, self._chosen, self._places, strict=True):
            tasks = places.select_columns("task")
            for start in range(0, len(chosen), _BATCH):
                counts.update(task or source.name for task in tasks[chosen[start : start + _BATCH]]["task"])
        return counts

    def damage(self) -> str:
        """Where the first file that is damaged is so, and how; nothing where all are as they should be."""
        for source, places in zip(self.sources, self._places, strict=True):
            for batch in places.select_columns(["line", "problem"]).iter(_BATCH):
                for line, problem in zip(batch["line"], batch["problem"], strict=True):
                    if problem:
                        return f"{source.file}:{line}: {problem}"
        return ""

    def _read(self, number: int, chosen: slice) -> Iterator[Entry]:
        """Records of one source, the file being opened once for all: neither processes nor threads share it."""
        source, indices = self.sources[number], self._chosen[number][chosen]
        rows = self._places[number][indices]
        columns = (rows[name] for name in ("offset", "length", "line", "task", "problem"))
        with open(source.file, "rb") as file:
            if _stamp(file.fileno()) != self._stamps[source.file]:
                raise RuntimeError(f"{source.file}: has changed while it was in use; start again")
            for index, offset, length, line, task, problem in zip(indices, *columns, strict=True):
                file.seek(offset)
                yield Entry(source, int(index), line, task or source.name, file.read(length), problem)


def _places(file: Path, stamp: str, cache_dir: str | PathLike[str] | None) -> datasets.Dataset:
    if next(find_records(file), None) is None:  # or an error, where it is no list
        return datasets.Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)
    key = f"{file.resolve()}, {stamp}, {_VERSION}"
    return datasets.Dataset.from_generator(
        _rows,
        features=_FEATURES,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"file": str(file)},
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
    )


def _rows(file: str) -> Iterator[dict[str, Any]]:
    for found in find_records(file):
        try:
            task = task_of(parse(found.text), "")
        except ValueError:
            task = ""
        yield {
            "offset": found.offset,
            "length": len(found.text),
            "line": found.line,
            "task": task,
            "problem": found.problem,
        }


def _stamp(file: Path | int) -> str:
    """Tells a file from what it was before."""
    status = os.stat(file)
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
