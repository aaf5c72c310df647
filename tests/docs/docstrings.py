"""Reads the sections of a docstring."""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")


@dataclass(frozen=True)
class Docstring:
    """The text of each section; `entries` splits one that lists things."""

    sections: dict[str, str]

    @classmethod
    def read(cls, text: str) -> Docstring:
        """From a docstring as `inspect.getdoc` cleans it: sections begin at its margin."""
        parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        for name, body in sections.items():
            if name != "Source":  # what is not indented is no longer part of the section
                sections[name] = re.match(r"\n?(?: .*\n?|\n)*", body)[0]
        return cls(sections)

    def entries(self, section: str) -> dict[str, str]:
        """name -> text; several names may share a text: `height, width: ...`."""
        found: dict[str, str] = {}
        for entry in re.split(r"^ {4}(?=\S)", self.sections.get(section, ""), flags=re.MULTILINE)[1:]:
            names, colon, text = entry.partition(":")
            found.update((name.strip().lstrip("*"), text) for name in names.split(",") if colon)
        return found
