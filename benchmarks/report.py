"""The table of a record, for the terminal: every case and implementation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record as records
from .record import ALLOCATORS, Measurement, Record

_ALLOCATOR_TITLES = {"default": "torch's allocator as it comes", "huge pages": "THP_MEM_ALLOC_ENABLE=1 (huge pages)"}
_NONE = "-"


def _number(value: float | None, pattern: str = "{:.3g}") -> str:
    return _NONE if value is None else pattern.format(value)


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return _number(value, "{:.0%}")


def _times(measurement: Measurement) -> list[str]:
    spread = f"{_milliseconds(measurement['p10_ms'])}..{_milliseconds(measurement['p90_ms'])}"
    return [_milliseconds(measurement["median_ms"]), spread]


def _allocators(record: Record) -> list[str]:
    present = {m["allocator"] for m in record["measurements"]}
    return [name for name in ALLOCATORS if name in present]


def _speed(record: Record, case: dict[str, Any], allocator: str, name: str) -> list[str]:
    """Median, spread, speed-up over the baseline, GB/s and share of the floor; empty cells without numbers."""
    found = records.measurements(record, case["name"], allocator)
    mine = records.named(found, name)
    if mine is None:
        return [_NONE] * 5
    return [
        *_times(mine),
        _number(records.ratio(records.named(found, case["baseline"]), mine), "{:.2f}"),
        _number(records.gigabytes_per_second(case, mine), "{:.1f}"),
        _percent(records.ratio(records.fastest(found, "floor"), mine)),
    ]


def _full_rows(record: Record, case: dict[str, Any]) -> list[list[str] | str]:
    allocators = _allocators(record)
    first = records.measurements(record, case["name"], allocators[0])
    rows: list[list[str] | str] = [f"{case['name']}  ({case['reason']})"]
    for mine in first:
        name = mine["implementation"]
        found = [m for m in record["measurements"] if (m["case"], m["implementation"]) == (case["name"], name)]
        reasons = {m["allocator"]: m["reason_without_numbers"] for m in found if m["reason_without_numbers"]}
        if len(set(reasons.values())) == 1 and len(reasons) == len(found):
            rows.append(f"  {name}: {mine['reason_without_numbers']}")
            continue
        rows += [f"  {name}, {_ALLOCATOR_TITLES[allocator]}: {reason}" for allocator, reason in reasons.items()]
        if mine["role"] == "floor" or len(reasons) == len(found):
            continue
        error = _number(mine.get("max_abs_error"), "{:.2g}") + ("" if mine.get("within_tolerance", True) else " !")
        peak = mine.get("peak_memory_bytes")
        row = [f"  {name}", error, _number(mine.get("error_over_reference"), "{:.2f}")]
        row.append(_number(peak and peak / 2**20, "{:.0f}"))
        for allocator in allocators:
            row += _speed(record, case, allocator, name)
        rows.append(row)
    floors = [records.fastest(records.measurements(record, case["name"], a), "floor") for a in allocators]
    if any(floors):
        row = ["  floor, the fastest", _NONE, _NONE, _NONE]
        for allocator, found in zip(allocators, floors, strict=True):
            row += _speed(record, case, allocator, found["implementation"] if found else "")
        rows.append(row)
    return rows


def full_table(record: Record) -> str:
    """Every case and implementation, fixed-width."""
    speed = ["median ms", "p10..p90", "x base", "GB/s", "of floor"]
    header = ["", "max abs err", "err/ref", "peak MiB"] + speed * len(_allocators(record))
    body = [row for case in record["cases"] for row in _full_rows(record, case)]
    cells = [header, *(row for row in body if isinstance(row, list))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    titles = [" " * (sum(widths[:4]) + 2 * 4)]
    for i, allocator in enumerate(_allocators(record)):
        width = sum(widths[4 + 5 * i : 9 + 5 * i]) + 2 * 5
        titles.append(f"| {_ALLOCATOR_TITLES[allocator]}".ljust(width))
    head = ["".join(titles).rstrip()] if record["environment"]["device_type"] == "cpu" else []
    head += [line(header), "-" * len(line(header))]
    return "\n".join([*head, *(line(row) if isinstance(row, list) else row for row in body), "", *_notes(record)])


def _notes(record: Record) -> list[str]:
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"{environment['device']}; {versions}; commit {environment['commit']}; {environment['date']}",
        _load(environment["cpu"]),
        f"clip: {record['clip']['file']}, {record['clip']['frames']} frames; {record['clip']['features']}",
        "x base: speed-up over the case's eager baseline as published. GB/s: bytes counted / median. of floor: the "
        "floor's median / this median.",
        "err/ref: error against float64, in units of the same-dtype reference's (the packer's: of the published "
        "modules'). !: more than twice the reference's error plus one rounding step.",
    ]
    lines += [f"{mode}: bytes counted are {text}." for mode, text in _bytes_counted(record).items()]
    lines += [f"backend {name} is not in the table: {reason}" for name, reason in record["backends"].items() if reason]
    return lines


def _load(cpu: dict[str, Any]) -> str:
    load = _number(cpu["load_average_1min"], "{:.1f}")
    return (
        f"{cpu['torch_threads']} threads on {cpu['logical_cores']} cores, load average at the start {load}. Samples of "
        "a case and allocator setting are interleaved, so compare within these rather than across."
    )


def _bytes_counted(record: Record) -> dict[str, str]:
    return {case["mode"]: case["bytes_counted"] for case in record["cases"] if "bytes_counted" in case}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, nargs="+", help="JSON file that `python -m benchmarks` wrote")
    options = parser.parse_args(arguments)
    print("\n\n".join(full_table(records.read(path)) for path in options.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
