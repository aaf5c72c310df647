"""The sections of what `python -m benchmarks` measures: one per kind of case, each implementation in each of them."""

from __future__ import annotations

from collections.abc import Sequence

from .. import record as records
from ..record import Measurement
from .archive import Archive, Result
from .charts import Curve, legend, over_frames, styles
from .comparisons import Comparison, comparisons
from .markup import (
    NONE,
    TIMES,
    Markup,
    details,
    element,
    joined,
    mebibytes,
    milliseconds,
    number,
    paragraph,
    percent,
    section,
    spread,
    table,
    times,
)

TITLES = {
    "path": "The whole path, from vision features to tokens",
    "packer": "Spatial-Temporal Packer",
    "attention": "Point-to-region attention",
    "point_to_region_attention_packed": "Attention in packed videos: point_to_region_attention_packed",
    "normalized_region_attention": "Attention of a folded packer: normalized_region_attention",
    "lape_mlp": "MLPs of a folded packer: lape_mlp",
    "region_centers": "Seeds of queries: region_centers",
    "lape_add": "Positions onto features: lape_add",
    "lape_add_packed": "Positions in packed videos: lape_add_packed",
    "neighboring_token_propagation": "Shared gradients of tables: neighboring_token_propagation",
    "lape_scatter": "Input embeddings: lape_scatter",
    "coordinate_cross_entropy": "The loss: coordinate_cross_entropy",
    "integration": "Modules of other models, as published and accelerated",
}


def in_order(results: Sequence[Result]) -> list[Result]:
    """By kind, in the order of the page: as above, then others."""
    order = list(TITLES)
    return sorted(results, key=lambda result: order.index(result.kind) if result.kind in TITLES else len(order))


def source(file: str) -> Markup:
    """A link to what the page says of the record."""
    return element("a", file.removesuffix(".json"), href=f"#record-{file}")


def parity(measured: Measurement) -> Markup:
    """Whether the results are as near to float64 as they must be."""
    if "within_tolerance" not in measured:
        return Markup(NONE)
    if not measured["within_tolerance"]:
        return element("span", "missed", class_="bad")
    return element("span", "met", class_="good")


_STANDING_CLASS = {"faster": "good", "slower": "bad", "level": "quiet", "alone": "quiet"}


def standing(one: Comparison) -> Markup:
    if one.other is None:
        return Markup(NONE)
    verdict = element("span", one.standing, class_=_STANDING_CLASS[one.standing])
    return _two_lines(joined(times(one.over_other), " ", verdict), one.other["implementation"])


def kind_sections(archive: Archive, machines: Sequence[str]) -> dict[str, Markup]:
    """Kind -> its section."""
    latest = in_order([result for machine in machines for result in archive.latest(machine)])
    kinds = dict.fromkeys(result.kind for result in latest)
    return {kind: _kind(kind, [result for result in latest if result.kind == kind]) for kind in kinds}


def _kind(kind: str, results: Sequence[Result]) -> Markup:
    parts = []
    for machine in dict.fromkeys(result.machine for result in results):
        here = [result for result in results if result.machine == machine]
        rows = [_row(one) for result in here for one in comparisons(result)]
        parts += [
            element("h3", machine),
            table(f"{TITLES.get(kind, kind)}, {machine}", _HEADER, rows),
            *_scaling(here),
            *(_every_implementation(result) for result in here),
        ]
    return section(kind, TITLES.get(kind, kind), *parts)


_HEADER = ["case", "ours", f"{TIMES} its baseline", f"{TIMES} fastest other", "of the limit"]
_HEADER += ["parity, error / PyTorch's", "peak MiB, ours / baseline", "record"]


def _row(one: Comparison) -> list[str]:
    baseline = one.result.baseline
    peaks = [one.checked.get("peak_memory_bytes"), one.result.checked(baseline).get("peak_memory_bytes")]
    return [
        _two_lines(one.result.name, f"allocator: {one.allocator}" if len(one.result.allocators()) > 1 else ""),
        _two_lines(milliseconds(one.ours["median_ms"]), one.ours["implementation"].rpartition(", ")[2]),
        _two_lines(times(one.over_baseline), baseline),
        standing(one),
        percent(one.share_of_limit),
        joined(parity(one.checked), " ", number(one.checked.get("error_over_reference"), "{:.2f}")),
        " / ".join(number(peak and peak / 2**20, "{:,.0f}") for peak in peaks),
        source(one.result.file),
    ]


def _two_lines(first: str, second: str) -> Markup:
    return joined(first, Markup("<br>"), element("span", second, class_="quiet")) if second else joined(first)


def _every_implementation(result: Result) -> Markup:
    """All that was measured of a case."""
    case, allocators = result.case, result.allocators()
    header = ["implementation", "largest error", "error / reference's", "parity", "peak memory"]
    for allocator in allocators:
        header += [
            f"median, {allocator}",
            "p10..p90",
            f"{TIMES} baseline",
            "GB/s" if "bytes_read" in case else "GFLOP/s",
        ]
        header.append("of the limit")
    rows = []
    measured = [m for allocator in allocators for m in result.found(allocator) if m["role"] != "floor"]
    for name in dict.fromkeys(m["implementation"] for m in measured):
        checked = result.checked(name)
        row: list[str] = [
            name,
            number(checked.get("max_abs_error"), "{:.2g}"),
            number(checked.get("error_over_reference"), "{:.2f}"),
            parity(checked),
            mebibytes(checked.get("peak_memory_bytes")),
        ]
        for allocator in allocators:
            row += _speed(result, allocator, records.named(result.found(allocator), name))
        rows.append(row)
    floors = [records.fastest(result.found(allocator), "floor") for allocator in allocators]
    if any(floors):
        rows.append(["the floor: its fastest kernel", NONE, NONE, Markup(NONE), NONE])
        for allocator, floor in zip(allocators, floors, strict=True):
            rows[-1] += _speed(result, allocator, floor)
    counts = sorted({len(m["samples_ms"]) for m in measured if "samples_ms" in m})
    samples = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}" if counts else "no"
    reasons = {m["implementation"]: reason for m in measured if (reason := m.get("reason_without_numbers"))}
    return details(
        f"{case['name']}: every implementation",
        paragraph(
            f"{case['reason']}. " if "reason" in case else "",
            f"{samples} samples of each. ",
            source(result.file),
            class_="quiet",
        ),
        table(f"{case['name']}, every implementation", header, rows),
        *(paragraph(f"{name}: {reason}.", class_="quiet") for name, reason in reasons.items()),
        *(paragraph(f"{what} counted: {case[key]}.", class_="quiet") for what, key in _COUNTED if key in case),
    )


_COUNTED = (("Bytes", "bytes_counted"), ("FLOPs", "flops_counted"))


def _speed(result: Result, allocator: str, mine: Measurement | None) -> list[str]:
    if mine is None:
        return [NONE] * 5
    compared = mine["role"] not in ("floor", "yardstick")
    baseline = records.named(result.found(allocator), result.baseline)
    rate = records.gigabytes_per_second(result.case, mine)
    flops = result.flops(mine["implementation"])
    if rate is None and flops is not None and compared:
        rate = flops / mine["median_ms"] / 1e6
    return [
        milliseconds(mine["median_ms"]),
        spread(mine["p10_ms"], mine["p90_ms"]),
        times(records.ratio(baseline, mine)) if compared else NONE,
        number(rate, "{:,.1f}"),
        percent(result.share_of_limit(allocator, mine)) if compared else NONE,
    ]


def _scaling(results: Sequence[Result]) -> list[Markup]:
    """Charts of the cases that differ in nothing but their number of frames."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        case = result.case
        if "frames" in case:
            groups.setdefault((case.get("stream", ""), case["dtype"], case["mode"]), []).append(result)
    scaled = {key: found for key, found in groups.items() if len({result.case["frames"] for result in found}) > 1}
    if not scaled:
        return []
    drawn: list[tuple[str, dict[str, list[tuple[int, Measurement]]]]] = []
    ours: list[str] = []
    for (stream, dtype, mode), found in scaled.items():
        for allocator in dict.fromkeys(allocator for result in found for allocator in result.allocators()):
            curves: dict[str, list[tuple[int, Measurement]]] = {}
            for result in sorted(found, key=lambda result: result.case["frames"]):
                for name, measured in _curve_points(result, allocator).items():
                    curves.setdefault(name, []).append((result.case["frames"], measured))
                    ours += [name] if measured["role"] == "ours" else []
            drawn.append((", ".join(part for part in (stream, mode, dtype, allocator) if part), curves))
    named = styles(dict.fromkeys(name for _, curves in drawn for name in curves), ours)
    present = {name: style for name, style in named.items() if any(name in curves for _, curves in drawn)}
    charts = [
        over_frames(title, [Curve(name, named[name], points) for name, points in curves.items()])
        for title, curves in drawn
        if curves
    ]
    files = dict.fromkeys(result.file for found in scaled.values() for result in found)
    links = [part for file in files for part in (" ", source(file))]
    return [
        element("div", *charts, class_="charts"),
        legend(present),
        paragraph("Medians, with a line from p10 to p90; both axes are logarithmic.", *links, class_="quiet"),
    ]


def _curve_points(result: Result, allocator: str) -> dict[str, Measurement]:
    """Implementation -> what is drawn of it; of the floor's kernels the fastest."""
    found = result.found(allocator)
    points = {m["implementation"]: m for m in records.timed(found, "ours", "reference", "peer")}
    order = {m["implementation"]: points[m["implementation"]] for m in found if m["implementation"] in points}
    floor = records.fastest(found, "floor")
    return order | ({"floor": floor} if floor is not None else {})
