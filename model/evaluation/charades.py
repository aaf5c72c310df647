"""Charades-STA: when something that is described happens (TVG)."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ..geometry import TimeSpan
from ..tasks import TASKS
from .records import Dataset, get, get_text, make_samples, numbers, read_list
from .samples import Sample

# A line of the annotations as Charades-STA's authors give them.
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)\s*##(?P<caption>.*)")

Unit = Literal["auto", "fraction", "seconds"]


def read_charades(path: str | PathLike[str], unit: Unit = "auto") -> Dataset:
    """Samples of `"tvg"`.

    The file is a list of records `{"image_id", "caption", "timestamp": [start, end]}`, or, with the suffix `.txt`, the
    original annotations, `VIDEO START END##CAPTION` in each line, in seconds.

    Args:
        path: the file.
        unit: of a record's timestamps: `"fraction"` of the video, as in the published evaluation, or `"seconds"`, which
            become fractions by the duration of what was shown. `"auto"`: fractions where none of the file is above 1.
    """
    if Path(path).suffix == ".txt":
        records = [_from_line(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        unit = "seconds"
    else:
        records = read_list(path)
        if unit == "auto":
            unit = "fraction" if all(_is_fraction(record) for record in records) else "seconds"
    notes = [f"timestamps are {'fractions of the video' if unit == 'fraction' else 'seconds'}"]
    return make_samples(path, records, lambda index, record: _sample(index, record, unit), notes)


def _from_line(line: str) -> Any:
    """A record, or the line itself where it is none."""
    found = _LINE.fullmatch(line.strip())
    try:
        return {
            "image_id": found["video"],
            "caption": found["caption"],
            "timestamp": [float(found["start"]), float(found["end"])],
        }
    except (TypeError, ValueError):
        return line


def _is_fraction(record: Any) -> bool:
    """Whether nothing in the record is above 1."""
    values = record.get("timestamp") if isinstance(record, dict) else None
    return not isinstance(values, list) or all(not isinstance(x, (int, float)) or x <= 1 for x in values)


def _sample(index: int, record: Any, unit: Unit) -> Sample:
    if isinstance(record, str):
        raise ValueError(f"expected VIDEO START END##CAPTION, got {record!r}")
    video, caption = get_text(record, "image_id"), get_text(record, "caption")
    start, end = numbers(get(record, "timestamp"), "timestamp", 2)
    if not 0 <= start <= end or (unit == "fraction" and end > 1):
        raise ValueError(f"timestamp: expected 0 <= start <= end{' <= 1' * (unit == 'fraction')}, got {[start, end]}")
    prompt = TASKS["tvg"].prompt(event=caption.replace(".", "").strip().lower())
    truth = TimeSpan(start, end)
    return Sample(index, f"{video}#{index}", "tvg", video, tuple(prompt), truth, in_seconds=unit == "seconds")
