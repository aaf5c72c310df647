"""What a reader wants first: how much faster on which device, whether results are right, what is missing or changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import llava_st_ops

from .archive import Archive, Result
from .cases import in_order, parity, source
from .charts import ratios
from .comparisons import Change, Comparison, changes, comparisons
from .markup import NONE, Markup, element, joined, mebibytes, milliseconds, paragraph, section, spread, table, times

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
Part = tuple[str, Callable[[Result], bool]]


def _parts() -> list[Part]:
    """What there is to measure, by what is public: each op, the loss on both sorts of labels, and the modules."""

    def kind(name: str) -> Callable[[Result], bool]:
        return lambda result: result.kind == name

    def adds(in_place: bool) -> Callable[[Result], bool]:
        return lambda result: result.kind == "lape_add" and (result.case["mode"] == "in place") == in_place

    def loss(hard: bool) -> Callable[[Result], bool]:
        return lambda result: result.kind == "coordinate_cross_entropy" and ("hard labels" in result.name) == hard

    special: dict[str, list[Part]] = {
        "point_to_region_attention": [("point_to_region_attention", kind("attention"))],
        "lape_add": [("lape_add", adds(in_place=False))],
        "lape_add_": [("lape_add_", adds(in_place=True))],
        "coordinate_cross_entropy": [
            ("coordinate_cross_entropy, any positions", loss(hard=False)),
            ("coordinate_cross_entropy, ordinary labels, with fused losses of others", loss(hard=True)),
        ],
    }
    found: list[Part] = []
    for name in sorted(llava_st_ops.__all__):
        public = getattr(llava_st_ops, name)
        if callable(public) and not isinstance(public, type) and name != "use_backend":
            found += special.get(name, [(name, kind(name))])
    modules = {"nn.SpatialTemporalPacker": "packer", "nn.VisualTokenizer, the whole path": "path"}
    modules |= {"integrations, modules of other models": "integration"}
    return found + [(name, kind(of)) for name, of in modules.items()]


def summary_section(archive: Archive) -> Markup:
    cards: list[Markup] = []
    tracks: dict[str, list[Comparison]] = {}
    for device_type, name in DEVICES.items():
        current = in_order(archive.current(device_type))
        found = [one for result in current for one in comparisons(result)]
        if not found:
            cards.append(
                _card(name, element("span", "no record", class_="warn"), f"No time of a {name} is quoted anywhere.")
            )
            continue
        cards += [_against_published(name, found), _against_all(name, found), _parity_card(name, current)]
        for machine in dict.fromkeys(one.result.machine for one in found):
            here = [one for one in found if one.result.machine == machine]
            tracks[machine] = [one for one in here if one.allocator == one.result.allocators()[0]]
    cards.append(_changes_card(list(changes(archive))))
    return section("summary", "In short", element("div", *cards, class_="cards"), *([ratios(tracks)] if tracks else []))


def _card(title: str, big: str, *text: str) -> Markup:
    return element("div", element("h3", title), element("p", big, class_="big"), paragraph(*text), class_="card")


def _against_published(name: str, found: Sequence[Comparison]) -> Markup:
    values = sorted(one.over_baseline for one in found if one.over_baseline is not None)
    if not values:
        return _card(f"{name}: against the published way", element("span", "no numbers", class_="warn"))
    slower = sum(value < 1 for value in values)
    return _card(
        f"{name}: against the published way",
        f"{times(values[0])} to {times(values[-1])}",
        f"as fast as the published way, eager (or the case's baseline); median {times(statistics.median(values))}. "
        f"{len(values)} comparisons, slower in {slower}. The newest record of each case.",
    )


def _against_all(name: str, found: Sequence[Comparison]) -> Markup:
    counts = {name: sum(one.standing == name for one in found) for name in ("faster", "level", "slower")}
    total = sum(counts.values())
    text = f"level within the spread in {counts['level']}, slower in {counts['slower']}."
    behind: dict[str, list[str]] = {}
    for one in found:
        if one.over_other is not None and one.over_other < 1:
            behind.setdefault(one.result.name, []).append(times(one.over_other))
    if behind:
        text += " Medians behind: "
        text += "; ".join(f"{case} ({', '.join(values)})" for case, values in behind.items()) + "."
    return _card(f"{name}: against the fastest of all others", f"faster in {counts['faster']} of {total}", text)


def _parity_card(name: str, current: Sequence[Result]) -> Markup:
    ours = [
        (result, m)
        for result in current
        for m in result.found(result.allocators()[0])
        if m["role"] == "ours" and "within_tolerance" in m
    ]
    missed = [f"{result.name}, {m['implementation']}" for result, m in ours if not m["within_tolerance"]]
    return _card(
        f"{name}: parity with float64",
        element("span", f"{len(ours) - len(missed)} of {len(ours)}", class_="bad" if missed else "good"),
        "results of ours are as near to float64 as they must be: at most twice the error of PyTorch in the same dtype "
        "and one rounding step",
        f"; missed: {'; '.join(missed)}." if missed else ".",
    )


def _changes_card(found: Sequence[Change]) -> Markup:
    slower = [change for change in found if change.verdict == "slower"]
    names = "; ".join(f"{change.new.name}, {change.now['implementation']}" for change in slower)
    return _card(
        "Against the record before",
        element("span", f"{len(slower)} slower", class_="bad" if slower else "good"),
        f"of {len(found)} measured twice on the same machine. ",
        f"{names}. " if names else "",
        element("a", "All changes", href="#changes"),
    )


def coverage_section(archive: Archive) -> Markup:
    rows = []
    for name, belongs in _parts():
        current = ([result for result in archive.current(device) if belongs(result)] for device in DEVICES)
        rows.append([name, *map(_coverage, current)])
    return section(
        "coverage",
        "What is measured, and what is not",
        paragraph("Every public op, and the modules of which a case exists."),
        table("Coverage", ["", *DEVICES.values()], rows, texts=3),
    )


def _coverage(results: Sequence[Result]) -> Markup:
    found = [one for result in results for one in comparisons(result) if one.over_baseline is not None]
    if not found:
        return element("span", "no record", class_="warn")
    values = [one.over_baseline for one in found]
    right = [parity(one.checked) for one in found if "within_tolerance" in one.checked]
    verdict = joined(", parity ", min(right, key=lambda text: "bad" not in text)) if right else ""
    span = times(min(values)) if len(values) == 1 else f"{times(min(values))} to {times(max(values))}"
    return joined(f"{span} its baseline", verdict)


def changes_section(archive: Archive) -> Markup:
    found = sorted(changes(archive), key=lambda change: change.verdict != "slower")
    styles = {"slower": "bad", "faster": "good"}
    rows = [
        [
            f"{change.new.name}, {change.allocator}",
            change.now["implementation"]
            if change.now["implementation"] == change.before["implementation"]
            else f"{change.now['implementation']} (was: {change.before['implementation']})",
            milliseconds(change.before["median_ms"]),
            spread(change.before["p10_ms"], change.before["p90_ms"]),
            milliseconds(change.now["median_ms"]),
            spread(change.now["p10_ms"], change.now["p90_ms"]),
            f"{change.ratio - 1:+.1%}",
            NONE if change.ratio_of_baseline is None else f"{change.ratio_of_baseline - 1:+.1%}",
            element("span", change.verdict, class_=styles.get(change.verdict, "quiet")),
            " → ".join(
                mebibytes(result.checked(m["implementation"]).get("peak_memory_bytes"))
                for result, m in ((change.old, change.before), (change.new, change.now))
            ),
            joined(source(change.old.file), " → ", source(change.new.file)),
        ]
        for change in found
    ]
    header = ["case", "implementation", "before", "p10..p90", "now", "p10..p90", "time", "time of the baseline"]
    return section(
        "changes",
        "Changes since the record before",
        paragraph(
            "The newest record of a case beside the one before on the same machine. Slower or faster: the ranges from "
            "p10 to p90 do not overlap. The baseline is code of others: what it lost or gained, the machine did. "
            "Records below that are not made of cases are replaced by the next measurement and are not compared."
        ),
        table("Changes", [*header, "verdict", "peak memory", "records"], rows, texts=2)
        if rows
        else paragraph("No case has two records of one machine."),
    )
