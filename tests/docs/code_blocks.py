"""The code blocks of Markdown pages, and how to run those in Python.

A block that cannot run says so in a comment before it, with the reason: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash", "sh", "shell", "console")

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block; `line` is that of its first line of code, `reason` why it is not run, None for one that is."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def compiled(self) -> Any:
        """Its code, with line numbers that are those of the page."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages (all by default), in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], code, match["reason"]))
    return [block for block in found if not languages or block.language in languages]


def run_python(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a page's Python blocks in order, as a newcomer would paste them; gives what they left behind.

    `names` are there from the start.
    """
    names = {**(names or {}), "__name__": page.stem}
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(block.compiled(), names)
    return names
