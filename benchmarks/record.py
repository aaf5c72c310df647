"""The record of a run: one JSON file, and what follows from its numbers.

A record holds `schema`, `environment` (benchmarks.environment), `clip`, `settings`, `cases` (benchmarks.cases: shape,
reason, bytes and FLOPs counted) and `measurements`: one per case, allocator setting and implementation, with raw
samples, median, p10 and p90 in ms, errors and peak memory. Ratios are not stored; they are computed here.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

SCHEMA = 1
ALLOCATORS = ("default", "huge pages")

Record = dict[str, Any]
Measurement = dict[str, Any]


def file_stem(record: Record) -> str:
    """Device and date, such as `amd-epyc-20260102-030405`."""
    device = re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")
    date = re.sub(r"[-:]", "", record["environment"]["date"])[:15].replace("T", "-")
    return f"{device}-{date}"


def write(record: Record, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(record)}.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Record:
    record = json.loads(path.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a record of schema {SCHEMA}, got {record.get('schema')!r}")
    return record


def measurements(record: Record, case: str, allocator: str) -> list[Measurement]:
    """Those of one case and allocator setting, in the order in which they ran."""
    return [m for m in record["measurements"] if m["case"] == case and m["allocator"] == allocator]


def timed(found: list[Measurement], *roles: str) -> list[Measurement]:
    """Those of the given roles that have samples, the fastest first."""
    return sorted((m for m in found if m["role"] in roles and "median_ms" in m), key=lambda m: m["median_ms"])


def fastest(found: list[Measurement], *roles: str) -> Measurement | None:
    return next(iter(timed(found, *roles)), None)


def named(found: list[Measurement], name: str) -> Measurement | None:
    return next((m for m in found if m["implementation"] == name and "median_ms" in m), None)


def ratio(slower: Measurement | None, faster: Measurement | None) -> float | None:
    """How many times longer the first takes, by medians."""
    return None if slower is None or faster is None else slower["median_ms"] / faster["median_ms"]


def paired_ratio(slower: Measurement, faster: Measurement) -> tuple[float, tuple[float, float] | None]:
    """How many times longer the first takes, by the median of the ratios within each round: a machine that gets slower
    from round to round changes both alike. And where that median lies with 95 % certainty, whatever the distribution
    (the sign test's interval); None where there are too few rounds to say."""
    ratios = sorted(a / b for a, b in zip(slower["samples_ms"], faster["samples_ms"], strict=True))
    count, below = len(ratios), 0.0
    for rank in range(count):  # of the ends of the interval, from each side
        below += math.comb(count, rank) / 2**count
        if below > 0.025:
            break
    median = statistics.median(ratios)
    return median, (ratios[rank - 1], ratios[count - rank]) if rank else None


def gigabytes_per_second(case: dict[str, Any], measurement: Measurement) -> float | None:
    """The bytes that the case counts, per second. Not what the implementation really moves, which may be more."""
    if "bytes_read" not in case:
        return None
    return (case["bytes_read"] + case["bytes_written"]) / measurement["median_ms"] / 1e6
