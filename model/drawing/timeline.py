"""A plot of when an answer says that things happen."""

from __future__ import annotations

import textwrap
import warnings
from os import PathLike

from ..answer import Answer
from ..geometry import Box, Instant, Tube
from .pictures import marks

MAX_ROWS = 50


def plot_timeline(answer: Answer, duration: float, path: str | PathLike[str], title: str = "") -> None:
    """Writes a plot of an answer's spans and tubes as bars and its points in time as lines, one row each, at most
    `MAX_ROWS`.

    Args:
        answer: in seconds.
        duration: of the video, in seconds.
        path: the name's ending chooses the format.
        title: stands above, for example the question.

    Needs matplotlib. Boxes without a time are left out; without any item the plot is empty but for the axis.
    """
    from matplotlib.figure import Figure

    timed = [mark for mark in marks(answer) if not isinstance(mark.item, Box)]
    if len(timed) > MAX_ROWS:
        title, timed = f"{title} (the first {MAX_ROWS} of {len(timed)})", timed[:MAX_ROWS]
    figure = Figure(figsize=(9, 1.4 + 0.45 * max(len(timed), 1)), layout="constrained")
    axes = figure.add_subplot()
    for row, mark in enumerate(timed):
        if isinstance(mark.item, Instant):
            axes.vlines(mark.item.time, row - 0.35, row + 0.35, color=mark.colour, linewidth=3)
            continue
        span = mark.item.span if isinstance(mark.item, Tube) else mark.item
        first, last = sorted((span.start, span.end))
        axes.barh(row, last - first, left=first, height=0.6, color=mark.colour, edgecolor=mark.colour)
        if isinstance(mark.item, Tube):  # where boxes were given
            axes.vlines(mark.item.times, row - 0.3, row + 0.3, color="black", linewidth=0.6)
    # Dollar signs in an answer are no formulas.
    axes.set_yticks(range(len(timed)), [mark.label for mark in timed], parse_math=False)
    axes.set_ylim(max(len(timed), 1) - 0.5, -0.5)
    axes.set_xlim(0, max(duration, 1e-3))
    axes.set_xlabel("seconds")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, 100, max_lines=2)), loc="left", fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks become boxes
        figure.savefig(path, dpi=150)
