"""A plot of a record: time per implementation over the number of frames, with the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import record as records
from .cases import MODES
from .record import ALLOCATORS, Measurement, Record

_TITLES = {"default": "torch's allocator as it comes", "huge pages": "THP_MEM_ALLOC_ENABLE=1"}


def _curves(record: Record, dtype: str, mode: str, allocator: str) -> dict[str, list[tuple[int, Measurement]]]:
    """For each implementation its measurements over frame counts, in the spatial stream. The floor is the fastest."""
    curves: dict[str, list[tuple[int, Measurement]]] = {}
    for case in record["cases"]:
        if (case.get("stream"), case["dtype"], case["mode"]) != ("spatial", dtype, mode):
            continue
        found = records.measurements(record, case["name"], allocator)
        floor = records.fastest(found, "floor")
        for measurement in (m for m in found if m["role"] != "floor" and "median_ms" in m):
            curves.setdefault(measurement["implementation"], []).append((case["frames"], measurement))
        if floor is not None:
            curves.setdefault("floor", []).append((case["frames"], floor))
    return curves


def _draw(axes: Any, curves: dict[str, list[tuple[int, Measurement]]], colors: dict[str, Any]) -> None:
    for name, points in curves.items():
        frames = [count for count, _ in points]
        ours = points[0][1]["role"] == "ours"
        style = {"linestyle": "--", "marker": ""} if name == "floor" else {"marker": "o", "markersize": 4}
        axes.plot(
            frames,
            [m["median_ms"] for _, m in points],
            label=name,
            color=colors[name],
            linewidth=2.5 if ours else 1.2,
            zorder=3 if ours else 2,
            **style,
        )
        low, high = ([m[key] for _, m in points] for key in ("p10_ms", "p90_ms"))
        axes.fill_between(frames, low, high, color=colors[name], alpha=0.12, linewidth=0)
    ticks = sorted({count for points in curves.values() for count, _ in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="both")


def write(record: Record, path: Path) -> None:
    """Columns: forward, forward+backward. Rows: allocator settings."""
    present = {m["allocator"] for m in record["measurements"]}
    allocators = [name for name in ALLOCATORS if name in present]
    dtype = record["cases"][0]["dtype"]  # the main one comes first
    panels = {(a, mode): _curves(record, dtype, mode, a) for a in allocators for mode in MODES}
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    palette = plt.get_cmap("tab10")
    colors = {name: "black" if name == "floor" else palette(i % 10) for i, name in enumerate(names)}
    figure, grid = plt.subplots(
        len(allocators),
        2,
        figsize=(12, 1.2 + 4.3 * len(allocators)),
        squeeze=False,
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    for row, allocator in enumerate(allocators):
        for column, mode in enumerate(MODES):
            axes = grid[row][column]
            _draw(axes, panels[allocator, mode], colors)
            title = mode if record["environment"]["device_type"] == "cuda" else f"{mode}; {_TITLES[allocator]}"
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("frames of 27x27 tokens")
            axes.set_ylabel("ms (median; band: p10 to p90)")
    for column, mode in enumerate(MODES):
        # Limits from the medians: one disturbed sample must not flatten the picture.
        curves = [points for allocator in allocators for points in panels[allocator, mode].values()]
        medians = [m["median_ms"] for points in curves for _, m in points]
        if medians:
            grid[0][column].set_ylim(min(medians) / 1.6, max(medians) * 1.6)
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    environment = record["environment"]
    figure.suptitle(
        f"Point-to-region attention, regions (1, 3, 3), 8 heads of 128, {dtype}\n"
        f"{environment['device']}, torch {environment['versions']['torch']}, {environment['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
