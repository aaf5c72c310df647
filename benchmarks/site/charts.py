"""Drawings without scripts: ratios as marks on tracks, and time over the number of frames as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..record import Measurement
from .comparisons import Comparison
from .markup import NONE, TIMES, Markup, element, milliseconds, spread, times

_COLORS = 7  # of style.css, for implementations that are not ours


def ratios(groups: Mapping[str, Sequence[Comparison]]) -> Markup:
    """Title -> comparisons. One track per case, on one logarithmic axis: how many times faster than the published way,
    and than the fastest other."""
    found = [one for group in groups.values() for one in group]
    values = [value for one in found for value in (one.over_baseline, one.over_other) if value is not None]
    low, high = min([0.5, *values]), max([2.0, *values]) * 1.1

    def place(value: float) -> str:
        return f"{100 * math.log(value / low) / math.log(high / low):.1f}%"

    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    lines = [
        element("i", style=f"left:{place(tick)}", class_="one" if tick == 1 else "line", aria_hidden="true")
        for tick in ticks
    ]
    names = [element("span", f"{tick:g}{TIMES}", style=f"left:{place(tick)}") for tick in ticks]
    axis = element("div", element("b"), element("div", *names, class_="ticks"), element("b"), class_="track-row axis")

    def row(one: Comparison) -> Markup:
        marks = [
            element("i", style=f"left:{place(value)}", class_=f"mark {name}", aria_hidden="true")
            for name, value in (("published", one.over_baseline), ("other", one.over_other))
            if value is not None
        ]
        both = f"{times(one.over_baseline)} / {times(one.over_other)}"
        label = element("span", one.result.name, class_="case")
        track = element("div", *lines, *marks, class_="track")
        return element("div", label, track, element("span", both, class_="value"), class_="track-row")

    key = element(
        "p",
        element("i", class_="mark published"),
        " how many times faster than the published way, eager, or the case's baseline; ",
        element("i", class_="mark other"),
        " than the fastest of all others, those of torch.compile included. Left of 1: slower.",
        class_="key",
    )
    drawn = [element("div", element("h3", title), axis, *map(row, group)) for title, group in groups.items()]
    return element("div", key, *drawn, class_="ratios")


@dataclass(frozen=True)
class Curve:
    """Times of one implementation over numbers of frames."""

    name: str
    style: str  # class of style.css
    points: Sequence[tuple[int, Measurement]]


def styles(names: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """A class for each implementation: ours stand out, the floor is dashed, others take a colour each."""
    mine = list(dict.fromkeys(ours))
    others = [name for name in names if name not in mine and name != "floor"]
    found = {name: "ours" if i == 0 else "ours second" for i, name in enumerate(mine)}
    return found | {name: f"s{i % _COLORS}" for i, name in enumerate(others)} | {"floor": "floor"}


_WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 30


def over_frames(title: str, curves: Sequence[Curve]) -> Markup:
    """Medians over frames, both logarithmic, with a line from p10 to p90 at each."""
    points = [point for curve in curves for point in curve.points]
    frames = sorted({count for count, _ in points})
    low = min(m["median_ms"] for _, m in points) / 1.4
    high = max(m["median_ms"] for _, m in points) * 1.4

    def x(count: int) -> float:
        share = math.log(count / frames[0]) / math.log(frames[-1] / frames[0])
        return _LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20)

    def y(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        _horizontal(y(tick), f"{tick / 1e3:g} s" if tick >= 1000 else f"{tick:g} ms") for tick in _ticks(low, high)
    ]
    parts += [_text(f"{count}", x(count), _HEIGHT - _BOTTOM + 16, "middle") for count in frames]
    parts.append(_text("frames", _LEFT, _HEIGHT - 1, "start"))
    for curve in curves:
        parts.append(
            element(
                "polyline",
                points=" ".join(f"{x(count):.1f},{y(m['median_ms']):.1f}" for count, m in curve.points),
                class_=f"curve {curve.style}",
            )
        )
        for count, m in curve.points:
            at, text = f"{x(count):.1f}", f"{curve.name}, {count} frames: {milliseconds(m['median_ms'])}"
            text += f" ({spread(m['p10_ms'], m['p90_ms'])})"
            ends = {"x1": at, "x2": at, "y1": f"{y(m['p10_ms']):.1f}", "y2": f"{y(m['p90_ms']):.1f}"}
            parts.append(element("line", class_=f"whisker {curve.style}", **ends))
            dot = {"cx": at, "cy": f"{y(m['median_ms']):.1f}", "r": "3"}
            parts.append(element("circle", element("title", text), class_=f"dot {curve.style}", **dot))
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    return element("figure", element("figcaption", title), drawing)


def _ticks(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    steps = [10.0**power * step for power in range(first, first + 8) for step in (1, 2, 3, 5)]
    inside = [step for step in steps if low <= step <= high]
    return inside if len(inside) < 8 else [step for step in inside if f"{step:e}"[0] == "1"]


def _horizontal(y: float, label: str) -> Markup:
    line = element("line", x1=f"{_LEFT}", x2=f"{_WIDTH - _RIGHT}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
    return Markup(line + _text(label, _LEFT - 4, y + 3.5, "end"))


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def legend(named: Mapping[str, str]) -> Markup:
    """Implementation -> its class."""
    items = [element("li", element("i", class_=f"swatch {style}"), name) for name, style in named.items()]
    return element("ul", *items, class_="legend") if items else Markup(NONE)
