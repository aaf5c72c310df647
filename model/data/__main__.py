"""`python -m llava_st.data`: checks, converts and makes training data. See docs/data.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .convert import FORMS, convert_file

_CHECK = "reports each broken record, one problem on a line, and counts by task; exits with 1 if any is broken"
_CONVERT = "writes plain numbers in texts as template tokens with positions, or back"
_SYNTHESIZE = "renders clips of moving shapes with questions about them, in the published format"


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever is in a broken file
    command = options.pop("command")
    try:
        return {"check": _check, "convert": _convert, "synthesize": _synthesize}[command](**options)
    except (OSError, ValueError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1


def _check(data: Path, folder: Path | None, media: bool, frames: int, **options: Any) -> int:
    from .check import Summary, check
    from .sources import read_sources

    summary = Summary()
    for checked in check(read_sources(data, folder), frames if media else None, **options):
        summary.add(checked)
        for problem in checked.problems:
            print(f"{checked.place}: {problem}")
    print(summary)
    return 1 if summary.broken.total() else 0


def _convert(source: Path, target: Path, to: str, decimals: int) -> int:
    counts = convert_file(source, target, to, decimals)
    print(f"{target}: {counts['converted']} converted, {counts['ambiguous']} ambiguous, {counts['broken']} broken")
    return 1 if counts["broken"] else 0


def _synthesize(out: Path, **options: Any) -> int:
    from ..synthesis import synthesize

    synthesize(out, **{name: value for name, value in options.items() if value is not None})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_st.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=_CHECK, description=_CHECK)
    check.add_argument("data", type=Path, help="YAML, or a file of records")
    check.add_argument("--folder", type=Path, help="of the media, where DATA is a file of records; by default its own")
    check.add_argument("--media", action="store_true", help="decodes videos and images, too")
    check.add_argument("--frames", type=int, default=100, help="of each video that --media decodes")
    check.add_argument("--workers", type=int, default=0, help="processes that check")
    check.add_argument("--selected", action="store_true", help="only records that sampling strategies take")
    check.add_argument("--seed", type=int, default=0, help="of random:N")
    check.add_argument("--cache-dir", type=Path, help="for the tables of where records are")
    convert = commands.add_parser("convert", help=_CONVERT, description=_CONVERT)
    convert.add_argument("source", type=Path, metavar="IN", help="a file of records")
    convert.add_argument("target", type=Path, metavar="OUT", help="may be the same")
    convert.add_argument("--to", choices=FORMS, required=True)
    convert.add_argument("--decimals", type=int, default=3, help="of numbers")
    synthesize = commands.add_parser("synthesize", help=_SYNTHESIZE, description=_SYNTHESIZE)
    synthesize.add_argument("out", type=Path, metavar="OUT", help="a folder")
    synthesize.add_argument("--clips", type=int, required=True)
    synthesize.add_argument("--seed", type=int, default=0)
    synthesize.add_argument("--split", choices=("train", "validation", "held-out"), default="train")
    synthesize.add_argument("--tasks", nargs="+", help="by default all")
    synthesize.add_argument("--size", type=int, help="of the pictures, in pixels")
    synthesize.add_argument("--frames", type=int, help="of a clip")
    synthesize.add_argument("--objects", type=int, nargs=2, metavar=("FEWEST", "MOST"), help="in a clip")
    synthesize.add_argument("--questions-per-clip", type=int)
    synthesize.add_argument("--mixed", action="store_true", help="turns of a record are of several tasks")
    synthesize.add_argument("--longest-tube", type=int, help="frames that SVG asks about; 1: a box at a time")
    synthesize.add_argument("--name", help="of the files of records; several over the same clips")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
