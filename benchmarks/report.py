"""Tables from records: the full one for the terminal, a short one for README.md.

python -m benchmarks.report RECORD... [--readme README.md [--check]]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record as records
from .environment import HUGE_PAGE_VARIABLE
from .pages import replace_part
from .record import ALLOCATORS, Measurement, Record

PART = "benchmark"
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


_SHORT_TABLE_FRAMES = 40


def _short_row(record: Record, case: dict[str, Any], allocator: str) -> list[str] | None:
    found = records.measurements(record, case["name"], allocator)
    ours, baseline = records.fastest(found, "ours"), records.named(found, case["baseline"])
    if ours is None or baseline is None:
        return None
    peers = [m for m in records.timed(found, "peer", "reference") if m is not baseline]
    floor = records.fastest(found, "floor")
    # Errors are measured once, with the first allocator setting.
    first = records.measurements(record, case["name"], _allocators(record)[0])
    checked = records.named(first, ours["implementation"])
    peer = f"{_milliseconds(peers[0]['median_ms'])} ({peers[0]['implementation']})" if peers else _NONE
    slower = _milliseconds(baseline["median_ms"])
    return [
        case["name"],
        allocator,
        _milliseconds(ours["median_ms"]),
        slower if "as published" in case["baseline"] else f"{slower} ({case['baseline']})",
        peer,
        _milliseconds(floor["median_ms"]) if floor else _NONE,
        _number(records.ratio(baseline, ours), "{:.1f}"),
        _number(records.ratio(peers[0], ours), "{:.2f}") if peers else _NONE,
        _percent(records.ratio(floor, ours)),
        _number(checked and checked.get("error_over_reference"), "{:.2f}"),
        _peaks(first, ours["implementation"], case["baseline"]),
    ]


def _peaks(found: list[Measurement], *names: str) -> str:
    """Peak memory of implementations in MiB, side by side."""
    peaks = [m.get("peak_memory_bytes") for m in (records.named(found, name) for name in names) if m]
    return " / ".join(_number(peak and peak / 2**20, "{:.0f}") for peak in peaks)


def markdown(record: Record, name: str) -> str:
    """One line per case and allocator setting; short clips are left to the record. `name` is the record's file."""
    environment = record["environment"]
    versions = environment["versions"]
    header = ["case", "allocator", "ours, ms", "eager as published, ms", "fastest other, ms", "floor, ms"]
    header += ["x eager", "x fastest other", "of floor", "error / reference's", "peak MiB, ours / eager"]
    cases = [case for case in record["cases"] if case.get("frames", _SHORT_TABLE_FRAMES) >= _SHORT_TABLE_FRAMES]
    rows = [_short_row(record, case, allocator) for case in cases for allocator in _allocators(record)]
    lines = [
        f"**{environment['device']}**, {environment['cpu']['torch_threads']} CPU threads, load average at the start "
        f"{_number(environment['cpu']['load_average_1min'], '{:.1f}')}, torch {versions['torch']}, "
        f"llava_st_ops {versions['llava_st_ops']}, commit {environment['commit'][:12]}, {environment['date'][:10]}. "
        f"Medians; record, with spread and all cases: `benchmarks/results/{name}`.",
        "",
        f"| {' | '.join(header)} |",
        f"|{'|'.join(['---'] * 2 + ['---:'] * (len(header) - 2))}|",
        *(f"| {' | '.join(row)} |" for row in rows if row is not None),
    ]
    if "huge pages" in _allocators(record):
        lines += ["", f"Allocator `huge pages`: torch run with {HUGE_PAGE_VARIABLE}=1, for all implementations alike."]
    return "\n".join(lines)


def generate_readme(text: str, tables: Sequence[str]) -> str:
    """`text` with what is between the two markers replaced by the tables."""
    return replace_part(text, PART, "\n\n".join(tables))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables from benchmark records.")
    parser.add_argument("record", type=Path, nargs="+", help="JSON file that `python -m benchmarks` wrote")
    parser.add_argument("--readme", type=Path, help=f"rewrite the part {PART} of this file")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it is out of date")
    options = parser.parse_args(arguments)
    if options.check and options.readme is None:
        parser.error("--check needs --readme")
    read = [(path, records.read(path)) for path in options.record]
    if options.readme is None:
        print("\n\n".join(full_table(record) for _, record in read))
        return 0
    text = options.readme.read_text()
    try:
        generated = generate_readme(text, [markdown(record, path.name) for path, record in read])
    except ValueError as error:
        parser.error(f"{options.readme}: {error}")
    if options.check:
        if generated != text:
            print(f"{options.readme} is out of date: run this without --check", file=sys.stderr)
        return int(generated != text)
    options.readme.write_text(generated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
