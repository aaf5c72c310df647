"""What is wrong with the records of a training set, one by one, and a summary by task."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import islice
from os import PathLike
from typing import NamedTuple

from .records import Message, Problem, find_problems, has_coordinates
from .sources import Source
from .table import Entry, RecordTable
from .training import MediaLoader

# Media are decoded, but nobody looks at them.
_IMAGE_SIZE = 8
# Consecutive records often ask about the same clip.
_REMEMBERED = 4096
_WINDOW = 256


class Checked(NamedTuple):
    """A record that was checked.

    Attributes:
        place: file and line and, where it is in a list, its index.
        task: the name of its task.
        coordinates: whether there are any in it.
        problems: all that is wrong with it.
    """

    place: str
    task: str
    coordinates: bool
    problems: tuple[Problem, ...]


class Summary:
    """Counts by task."""

    def __init__(self) -> None:
        self.records: Counter[str] = Counter()
        self.coordinates: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()

    def add(self, checked: Checked) -> None:
        self.records[checked.task] += 1
        self.coordinates[checked.task] += checked.coordinates
        self.broken[checked.task] += bool(checked.problems)

    def __str__(self) -> str:
        rows = [(task, self.records[task], self.coordinates[task], self.broken[task]) for task in sorted(self.records)]
        rows.append(("all", self.records.total(), self.coordinates.total(), self.broken.total()))
        width = max(len(row[0]) for row in [*rows, ("task",)])
        lines = [f"{'task':<{width}}  {'records':>10}  {'with coordinates':>16}  {'broken':>8}"]
        for task, count, coordinates, broken in rows:
            share = f"{coordinates / count:.1%}" if count else "-"
            lines.append(f"{task:<{width}}  {count:>10}  {share:>16}  {broken:>8}")
        return "\n".join(lines)


def check(
    sources: Sequence[Source],
    media_frames: int | None = None,
    workers: int = 0,
    seed: int = 0,
    cache_dir: str | PathLike[str] | None = None,
    selected: bool = False,
) -> Iterator[Checked]:
    """Checks record after record; what is broken stops nothing.

    Args:
        sources: where the records come from; a file that several name is checked once for each folder of media.
        media_frames: decodes the media, that many frames of each video; None: media are not looked at.
        workers: processes that check; 0: this one.
        seed: of the records that `random:N` takes.
        cache_dir: see `RecordTable`.
        selected: checks the records that the sources' strategies take, not all.
    """
    if not selected:
        sources = list({(source.file, source.folder): source for source in reversed(sources)}.values())[::-1]
    check_one = partial(_check, media_frames=media_frames)
    for source in sources:
        try:
            table = RecordTable([source], seed, cache_dir, everything=not selected)
        except (OSError, ValueError) as error:
            yield Checked(str(source.file), source.name, False, (Problem("not JSON", str(error)),))
            continue
        yield from map(check_one, table) if workers == 0 else _in_processes(check_one, table, workers)


def _in_processes(check_one: partial[Checked], entries: Iterable[Entry], workers: int) -> Iterator[Checked]:
    remaining, pool = iter(entries), _pool(workers)
    try:
        # A window at a time: `map` reads all of them first.
        while window := list(islice(remaining, _WINDOW * workers)):
            try:
                yield from list(pool.map(check_one, window, chunksize=_WINDOW // 8))
            except BrokenProcessPool:  # a decoder crashed: one after another, to find out where
                pool.shutdown()
                yield from _one_by_one(check_one, window)
                pool = _pool(workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(check_one: partial[Checked], entries: Iterable[Entry]) -> Iterator[Checked]:
    pool = _pool(1)
    try:
        for entry in entries:
            try:
                yield pool.submit(check_one, entry).result()
            except BrokenProcessPool:
                checked = _check(entry, None)
                problem = Problem("media undecodable", "the process that decoded them died")
                yield checked._replace(problems=(*checked.problems, problem))
                pool.shutdown()
                pool = _pool(1)
    finally:
        pool.shutdown()


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes whose end is an error; one of `multiprocessing.Pool` would be waited for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context)


def _check(entry: Entry, media_frames: int | None) -> Checked:
    place = entry.place
    problems = [Problem("not JSON", entry.problem)] if entry.problem else []
    try:
        record = entry.record()
    except ValueError as error:
        return Checked(place, entry.task, False, tuple(problems or [Problem("not JSON", str(error))]))
    load = None if media_frames is None else partial(_load, num_frames=media_frames)
    problems += find_problems(record, entry.source.folder, load)
    return Checked(place, entry.task, has_coordinates(record), tuple(problems))


def _load(part: Message, num_frames: int) -> None:
    if error := _error(part["type"], part[part["type"]], part.get("clip"), num_frames):
        raise error


@lru_cache(_REMEMBERED)
def _error(kind: str, name: str, clip: tuple[int, int] | None, num_frames: int) -> Exception | None:
    try:
        MediaLoader(num_frames, _IMAGE_SIZE)({"type": kind, kind: name, "clip": clip})
    except Exception as error:
        return error.with_traceback(None)
    return None
