"""How memory grows with the number of training records: it should not, and a million may take 200 MB.

`python -m benchmarks.record_memory` writes 4 GB of records to a temporary folder (`TMPDIR`), reads them,
writes `benchmarks/results/record_memory.json`, and makes the figures of docs/data.md anew from it (`--report` does that
alone).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from llava_st.data.order import EpochSampler
from llava_st.data.training import TrainingData

from .environment import ROOT, describe
from .pages import measure_command, replace_part

RECORD = ROOT / "benchmarks" / "results" / "record_memory.json"
PAGE = ROOT / "docs" / "data.md"
FEW, MANY = 100, 1_000_000
_ANSWER = "word " * 750


def write_many(path: Path, count: int) -> None:
    """So many records of one question and one long answer."""
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": _ANSWER}]
    with path.open("w") as file:
        for number in range(count):
            record = {"id": str(number), "video": "clip.mp4", "conversations": turns, "type": "tvg", "extra": [number]}
            file.write(json.dumps(record) + "\n")


def read_all(path: Path, cache: Path) -> tuple[int, int]:
    """How many records there are and their characters. Reads each in any order and in its own, some as samples."""
    data = TrainingData(path, load=None, cache_dir=cache)
    for index in EpochSampler(len(data)):
        data.table[index]
        if index % 7 == 0:
            data[index]
    return len(data), sum(len(entry.text) for entry in data.table)


def _growth(few: Path, many: Path, cache: Path) -> dict[str, Any]:
    read_all(few, cache)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    count, characters = read_all(many, cache)
    return {
        "records": count,
        "characters": characters,
        "grown_bytes": process.memory_info().rss - before,
        "seconds": time.perf_counter() - start,
    }


def growth(folder: Path, count: int) -> dict[str, Any]:
    """What reading `count` records takes in a process that has read a few: resident memory in bytes, and seconds.

    `folder` gets the records.
    """
    few, many = (folder / f"{name}.jsonl" for name in ("few", "many"))
    write_many(few, FEW)
    write_many(many, count)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as other:
        return other.submit(_growth, few, many, folder / "cache").result()


def figures(record: dict[str, Any]) -> str:
    environment, found = record["environment"], record["growth"]
    return (
        f"{found['records']:,} records of {found['characters'] / found['records'] / 1e3:.1f} kB, indexed and then read "
        f"in any order and in their own, take {found['grown_bytes'] / 1e6:.0f} MB of resident memory more than "
        f"{FEW} records, and {found['seconds']:.0f} s\n({environment['device']}, {environment['date'][:10]}, commit "
        f"{environment['commit'][:12]}, `benchmarks/results/{RECORD.name}`)."
    )


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "memory", figures(record))


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"environment": describe(torch.device("cpu")), "growth": growth(Path(folder), MANY)}


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
