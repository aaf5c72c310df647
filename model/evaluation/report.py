"""Reports of scores for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of each list of what went wrong; the JSON file has all.
_SHOWN = 5


def format_report(report: Mapping[str, Any]) -> str:
    """A report of `score` as text: scores, counts, and the first entries of each list."""
    counts = report["counts"]
    lines = [f"{report['task'].upper()}, {report['metrics']} metrics (llava_st {report['version']})"]
    if not report["complete"]:
        lines.append(f"NOT COMPLETE: {counts['predicted']} of {counts['samples']} samples have predictions")
    lines += [*report["notes"], ""]
    values = {name: f"{value:.2f}" for name, value in report["scores"].items()}
    values |= {name: "absent" for name in report["absent"]}
    lines += [*_table(values), "", *_table({name: str(count) for name, count in counts.items()})]
    for reason in dict.fromkeys(report["absent"].values()):
        names = ", ".join(name for name, other in report["absent"].items() if other == reason)
        lines += ["", f"absent: {names}: {reason}"]
    for name in ("missing", "undecodable", "unparsable"):
        lines += _listed(name, [f"{entry['id']}: {entry['reason']}" for entry in report[name]])
    return "\n".join([*lines, *_listed("broken", report["broken"])]) + "\n"


def _table(rows: Mapping[str, str]) -> list[str]:
    left, right = max(map(len, rows), default=0), max(map(len, rows.values()), default=0)
    return [f"  {name:{left}}  {value:>{right}}" for name, value in rows.items()]


def _listed(name: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  and {len(entries) - _SHOWN} more"] * (len(entries) > _SHOWN)
    return ["", f"{name}:", *(f"  {entry}" for entry in entries[:_SHOWN]), *more]
