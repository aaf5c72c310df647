"""The generated parts of docs/folding.md: products and bytes counted from shapes, errors and times from records.

python -m benchmarks.folding_report RECORD... [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from . import folding_error, path_workloads
from . import record as records
from .cases import MODES
from .environment import ROOT
from .kept_memory import kept_channels, ways
from .pages import replace_part
from .record import Record

PAGE = ROOT / "docs" / "folding.md"
BYTES = 2  # of bfloat16


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flops_table() -> str:
    rows = []
    for frames in (15, 100):
        for mode in MODES:
            published, folded = (path_workloads.path_flops(frames, mode, way) for way in (False, True))
            rows.append(
                [
                    f"{frames} frames, {mode}",
                    f"{published / 1e12:.3f}",
                    f"{folded / 1e12:.3f}",
                    f"{published / folded:.2f}",
                ]
            )
    return _table(["", "published, TFLOP", "folded, TFLOP", "ratio"], rows)


def kept_table() -> str:
    sizes = (path_workloads.VISION, path_workloads.WIDTH, path_workloads.EMBED, path_workloads.HEADS, 100)
    rows = []
    for name, make in ways(*sizes).items():
        channels = kept_channels(make, path_workloads.VISION)
        rows.append([name, f"{channels}", f"{channels * BYTES / 1024:.1f}"])
    return _table(["", "numbers per raw token", "KiB in bfloat16"], rows)


def error_table() -> str:
    record = json.loads(folding_error.RECORD.read_text())
    rows = [
        [
            row["regime"],
            row["dtype"],
            f"{row['median_ratio']:.3f}",
            f"{row['largest_ratio']:.3f}",
            f"{len(row['folded'])}",
        ]
        for row in record["rows"]
    ]
    return _table(["weights", "dtype", "median ratio", "largest", "draws"], rows)


def time_table(read: Sequence[tuple[str, Record]]) -> str:
    parts = []
    for name, record in read:
        environment = record["environment"]
        rows = [row for case in record["cases"] if case["kind"] == "path" for row in _time_rows(record, case)]
        header = ["case", "way", "median, s", "p10..p90", "x eager", "x compiled", "GFLOP/s", "of the product's"]
        parts.append(
            f"**{environment['device']}**, {environment['cpu']['torch_threads']} threads, load average at the start "
            f"{environment['cpu']['load_average_1min']:.1f}, torch {environment['versions']['torch']}, commit "
            f"{environment['commit'][:12]}, {environment['date'][:10]}; `benchmarks/results/{name}`.\n\n"
            + _table([*header, "peak, MiB"], rows)
        )
    return "\n\n".join(parts)


def _time_rows(record: Record, case: dict) -> list[list[str]]:
    found = records.measurements(record, case["name"], "default")
    eager, compiled = (records.named(found, f"published path, {way}") for way in ("eager", "compiled"))
    yardstick = records.named(found, path_workloads.YARDSTICK)
    rate = case["yardstick_flops"] / yardstick["median_ms"]
    rows = []
    for mine in found:
        if "median_ms" not in mine or mine is yardstick:
            continue
        flops = case["flops_folded"] if mine["implementation"] == path_workloads.FOLDED else case["flops"]
        own_rate = flops / mine["median_ms"]
        faster = [records.ratio(other, mine) for other in (eager, compiled)]
        rows.append(
            [
                f"{case['frames']} frames, {case['mode']}, {case['dtype']}",
                mine["implementation"],
                f"{mine['median_ms'] / 1e3:.2f}",
                f"{mine['p10_ms'] / 1e3:.2f}..{mine['p90_ms'] / 1e3:.2f}",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in faster),
                f"{own_rate / 1e6:.0f}",
                f"{own_rate / rate:.0%}",
                "-" if mine.get("peak_memory_bytes") is None else f"{mine['peak_memory_bytes'] / 2**20:.0f}",
            ]
        )
    return rows


def generate(text: str, read: Sequence[tuple[str, Record]]) -> str:
    """The page with what is between its pairs of markers made anew."""
    sections: dict[str, Callable[[], str]] = {
        "flops": flops_table,
        "kept": kept_table,
        "errors": error_table,
        "times": lambda: time_table(read),
    }
    for name, make in sections.items():
        text = replace_part(text, name, make())
    return text


def records_named(text: str) -> list[Path]:
    """The records that the page's tables are from."""
    names = [part.partition("`")[0] for part in text.split("`benchmarks/results/")[1:]]
    return [ROOT / "benchmarks" / "results" / name for name in names if name != folding_error.RECORD.name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "record", type=Path, nargs="*", help="records with the path; default: those that the page names"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*takes the PyTorch reference.*")
    text = PAGE.read_text()
    paths = options.record or records_named(text)
    generated = generate(text, [(path.name, records.read(path)) for path in paths])
    if options.check:
        if generated != text:
            print(f"{PAGE} is out of date: run this without --check", file=sys.stderr)
        return int(generated != text)
    PAGE.write_text(generated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
