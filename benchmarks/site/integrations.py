"""The table of docs/integrations.md: modules of other packages before and after."""

from __future__ import annotations

from .. import record as records
from ..integration_workloads import AFTER, BEFORE
from ..record import Measurement
from .archive import Archive, Result
from .markup import mebibytes, milliseconds, number, spread, times
from .summary import DEVICES

KIND = "integration"


def table(archive: Archive) -> str:
    parts = []
    for device_type, name in DEVICES.items():
        found = [result for result in archive.current(device_type) if result.kind == KIND]
        files = dict.fromkeys(result.file for result in found)
        parts += [_of_record([result for result in found if result.file == file]) for file in files]
        parts += [] if files else [f"**{name}**: no record."]
    return "\n\n".join(parts)


def _of_record(results: list[Result]) -> str:
    environment, file = results[0].record["environment"], results[0].file
    rows = [
        f"**{environment['device']}**, {environment['cpu']['torch_threads']} threads, load average at the start "
        f"{environment['cpu']['load_average_1min']:.1f}, torch {environment['versions']['torch']}, "
        f"{environment['date'][:10]}, commit {environment['commit'][:12]}; "
        f"`benchmarks/results/{file}`.",
        "",
        "| module | published (p10..p90) | accelerated (p10..p90) | times faster (95 %) | error ratio | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*rows, *map(_row, results)])


def _row(result: Result) -> str:
    (allocator,) = result.allocators()
    before, after = (records.named(result.found(allocator), name) for name in (BEFORE, AFTER))
    ratio, interval = records.paired_ratio(before, after)
    cells = [
        result.name,
        *map(_time, (before, after)),
        times(ratio) + (f" ({interval[0]:.2f}..{interval[1]:.2f})" if interval else ""),
        number(after.get("error_over_reference"), "{:.2f}"),
        " → ".join(mebibytes(measured.get("peak_memory_bytes")) for measured in (before, after)),
    ]
    return f"| {' | '.join(cells)} |"


def _time(measured: Measurement) -> str:
    return f"{milliseconds(measured['median_ms'])} ({spread(measured['p10_ms'], measured['p90_ms'])})"
