"""HTML as text: elements that escape what they hold, tables, and how quantities are written."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML already."""


NONE = "-"
TIMES = "\N{MULTIPLICATION SIGN}"


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """Children that are not Markup are escaped. Attributes: `class_` is written `class`, `_` as `-`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    return Markup(f"<{tag}{written}>{inside}</{tag}>")


def joined(*parts: str) -> Markup:
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def paragraph(*children: str, **attributes: str) -> Markup:
    return element("p", *children, **attributes)


def code(text: str) -> Markup:
    return element("code", text)


def table(label: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Markup:
    """The first `texts` columns are text, the others numbers. It scrolls by itself where the page is narrow."""

    def cells(tag: str, row: Sequence[str]) -> list[Markup]:
        return [
            element(tag, cell, class_="text") if column < texts else element(tag, cell)
            for column, cell in enumerate(row)
        ]

    head = element("thead", element("tr", *cells("th", header)))
    body = element("tbody", *(element("tr", *cells("td", row)) for row in rows))
    return element("div", element("table", head, body), class_="scroll", tabindex="0", role="region", aria_label=label)


def details(summary: str, *children: str) -> Markup:
    return element("details", element("summary", summary), *children)


def section(name: str, title: str, *children: str) -> Markup:
    return element("section", element("h2", title), *children, id=name)


def milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def spread(low: float, high: float) -> str:
    """In the unit of the larger."""
    if high >= 1000:
        return f"{low / 1e3:.2f}..{high / 1e3:.2f} s"
    digits = 3 if high < 1 else 2 if high < 100 else 0
    return f"{low:.{digits}f}..{high:.{digits}f} ms"


def number(value: float | None, pattern: str) -> str:
    return NONE if value is None else pattern.format(value)


def times(value: float | None) -> str:
    """A ratio: two digits after the point where it is near 1."""
    return NONE if value is None else f"{value:.{2 if value < 2 else 1}f}{TIMES}"


def percent(value: float | None) -> str:
    return number(value, "{:.0%}")


def mebibytes(value: float | None) -> str:
    return NONE if value is None else f"{value / 2**20:,.0f} MiB"
