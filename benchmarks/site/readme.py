"""README's tables: one line per case and device, of the longest clip that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from .archive import Archive, Result
from .cases import in_order
from .comparisons import Comparison, comparisons
from .markup import NONE, TIMES, milliseconds, number, percent, times
from .summary import DEVICES

_HEADER = ["case", "ours", f"{TIMES} its baseline", f"{TIMES} fastest other", "of the limit", "error / reference's"]
_HEADER += ["peak MiB, ours / baseline", "record"]


def tables(archive: Archive) -> str:
    parts = []
    for device_type, name in DEVICES.items():
        current = _longest(archive.current(device_type))
        shown = [found for result in current if (found := comparisons(result))]
        machines = dict.fromkeys(found[0].result.machine for found in shown)
        parts += [_table(archive, machine, shown) for machine in machines] or [f"**{name}**: no record."]
    parts.append(
        "Medians of the newest record of each case. *Its baseline*: the published modules, eager; of `lape_scatter` "
        "and the loss, PyTorch in vectorised and in chunked form. *Fastest other*: of all other ways, those of "
        "`torch.compile` included. In brackets: with huge pages, which torch's allocator takes with "
        "THP_MEM_ALLOC_ENABLE=1. *The limit*: of this machine, for as many bytes or matrix products. Shorter clips, "
        "every implementation, spreads and what changed: [the report](docs/report.html)."
    )
    return "\n\n".join(parts)


def _longest(results: Sequence[Result]) -> list[Result]:
    """Of cases that differ in nothing but frames, the one with most; in the order of the page."""
    kept: dict[str, Result] = {}
    for result in results:
        frames = result.case.get("frames")
        rest = result.name.replace(f"{frames} frames", "")
        if rest not in kept or frames > kept[rest].case["frames"]:
            kept[rest] = result
    return in_order(list(kept.values()))


def _table(archive: Archive, machine: str, shown: Sequence[Sequence[Comparison]]) -> str:
    here = [found for found in shown if found[0].result.machine == machine]
    files = list(dict.fromkeys(found[0].result.file for found in here))
    rows = [_row(found, f"[{files.index(found[0].result.file) + 1}]") for found in here]
    lines = [
        f"**{machine}**. {_standing([one for found in here for one in found])}",
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|---|{'---:|' * (len(_HEADER) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"[{number}] {_record(archive, file)}  " for number, file in enumerate(files, 1)),
    ]
    return "\n".join(lines).rstrip()


def _standing(found: Sequence[Comparison]) -> str:
    counts = {name: sum(one.standing == name for one in found) for name in ("faster", "level", "slower")}
    return (
        f"Of {sum(counts.values())} comparisons with the fastest of all other ways, ours is faster in "
        f"{counts['faster']}, level within the spread in {counts['level']}, slower in {counts['slower']}."
    )


def _record(archive: Archive, file: str) -> str:
    environment = archive.runs[file]["environment"]
    load = number(environment["cpu"]["load_average_1min"], "{:.1f}")
    return (
        f"`benchmarks/results/{file}`, commit {environment['commit'][:12]}, {environment['date'][:10]}, torch "
        f"{environment['versions']['torch']}, load average {load}"
    )


def _row(found: Sequence[Comparison], source: str) -> list[str]:
    """Of the first allocator setting; ratios of the others in brackets."""
    first, *others = found
    peaks = [first.checked.get("peak_memory_bytes")]
    peaks.append(first.result.checked(first.result.baseline).get("peak_memory_bytes"))

    def bracketed(name: str) -> str:
        inside = ", ".join(times(getattr(one, name)) for one in others)
        return times(getattr(first, name)) + (f" ({inside})" if inside else "")

    return [
        first.result.name,
        milliseconds(first.ours["median_ms"]),
        bracketed("over_baseline"),
        bracketed("over_other"),
        percent(first.share_of_limit),
        number(first.checked.get("error_over_reference"), "{:.2f}"),
        " / ".join(NONE if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
        source,
    ]
