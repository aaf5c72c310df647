"""Documents with parts that records make."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def replace_part(text: str, name: str, content: str) -> str:
    """A document whose part between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is `content`.

    Raises:
        ValueError: the document has no such part.
    """
    first, last = (f"<!-- {name}:{side} -->" for side in ("begin", "end"))
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected {first} and, after it, {last}")
    return f"{before}{first}\n\n{content}\n\n{last}{after}"


def measure_command(
    arguments: Sequence[str] | None,
    description: str | None,
    measure: Callable[[], Record],
    record: Path,
    page: Callable[[str, Record], str],
    document: Path,
) -> int:
    """A command that measures, writes a record, and makes a part of a document from it.

    Args:
        arguments: of the command.
        description: of it.
        measure: gives the record.
        record: where that goes, unless `--out` says otherwise.
        page: the document's text and the record -> its new text.
        document: the file.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing: the page, from the record")
    parser.add_argument("--out", type=Path, default=record, help="where the record goes")
    options = parser.parse_args(arguments)
    if not options.report:
        options.out.write_text(json.dumps(measure(), indent=1) + "\n")
    document.write_text(page(document.read_text(), json.loads(options.out.read_text())))
    return 0
