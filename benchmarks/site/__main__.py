"""The page of all records, and the tables of README.md and docs/integrations.md.

python -m benchmarks.site [--check]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..environment import ROOT
from ..pages import replace_part
from .archive import Archive
from .integrations import table
from .page import page
from .readme import tables

README_PART, INTEGRATIONS_PART = "benchmark", "times"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.site",
        description="Makes one HTML page of all records, and the tables of README.md and docs/integrations.md.",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the records")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report.html", help="the page")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=f"its part {README_PART} is made anew")
    parser.add_argument(
        "--integrations",
        type=Path,
        default=ROOT / "docs" / "integrations.md",
        help=f"its part {INTEGRATIONS_PART} is made anew",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if anything is out of date")
    options = parser.parse_args(arguments)
    archive = Archive.read(options.results)
    folder = Path(os.path.relpath(options.results, options.out.parent)).as_posix()
    made = {options.out: page(archive, folder)}
    for path, part, content in (
        (options.readme, README_PART, tables(archive)),
        (options.integrations, INTEGRATIONS_PART, table(archive)),
    ):
        try:
            made[path] = replace_part(path.read_text(), part, content)
        except ValueError as error:
            parser.error(f"{path}: {error}")
    outdated = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in outdated:
            print(f"{path} is out of date: make report", file=sys.stderr)
        return int(bool(outdated))
    for path in outdated:
        path.write_text(made[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
