"""Mutants of C++ sources, made by rule and all written into one copy of the sources, to be chosen from at run time.

The rules work on text, and rely on clang-format: a binary operator has spaces around it, and no bracket of a template
has. What the compiler evaluates (constexpr, static_assert, if constexpr) has no mutants.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One change, at one place."""

    number: int
    file: str
    line: int
    rule: str
    source: str  # the line as it is

    def __str__(self) -> str:
        return f"{self.number:4} {self.file}:{self.line}: {self.rule}: {self.source.strip()}"

    def name(self) -> str:
        """What it is called wherever its line moves to."""
        return f"{self.file}: {self.rule}: {self.source.strip()}"


@dataclass(frozen=True)
class Edit:
    """Replaces `text[begin:end]`; `rules` says what each of the mutants in it does, `{0}` being the first's number."""

    begin: int
    end: int
    replacement: str
    rules: tuple[str, ...]


_EVALUATED_BY_COMPILER = re.compile(r"\bconstexpr\b|\bstatic_assert\b|^\s*template\b|^\s*using\b|^\s*#|^\s*//")
_COMPARISON = re.compile(r" (<|<=|>|>=|==|!=) ")
_ARITHMETIC = re.compile(r" ([*/%]) (?!which)")
_BARRIER = re.compile(r"(?<![\w:])(?:block|warp)_barrier\(\);")
_AND = re.compile(r" && ")
_IF = re.compile(r"\bif \((?!constexpr)")
_MASKED_VALUE = re.compile(r"(?:(?<=[^=!<>]= )|(?<=\()|(?<=return ))(!?\w[\w.]*(?:\[\w+\])?) \? ")
# Members of strides and extents where they are read; the one that stands in.
_OTHER_AXIS = {"t": "h", "h": "w", "w": "t", "head": "w", "sample": "t"}
_CHAIN = r"(?<![\w.>])((?:\w+(?:\[\w+\])?(?:\.|->))*"
_AXIS = re.compile(_CHAIN + r"(?:\w+(?=\.[thw]\b)|strides))\.(t|h|w|head|sample)\b(?!\s*=[^=]|\(|\[|\.)")
_OTHER_OFFSET = {"key": "query", "query": "key"}
_OFFSET = re.compile(r"(?<![\w.>])((?:site\.)?(?:begin|total|a|b))\.(key|query)\b(?!\s*=[^=])")


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError("unbalanced parentheses")


def _edits(line: str) -> Iterator[Edit]:
    """All mutants of one line."""
    for found in _BARRIER.finditer(line):
        yield Edit(found.start(), found.start(), "if (!mutants::alive({0})) ", ("barrier dropped",))
    for found in _COMPARISON.finditer(line):
        op = found[1]
        rules = [f"`{op}` flipped"]
        if op[0] in "<>":
            rules.append(f"`{op}` loosened" if op in "<>" else f"`{op}` tightened")
        yield Edit(*found.span(), f" {op}mutants::Compare<{{0}}>{{{{}}}}{op} ", tuple(rules))
    for found in _ARITHMETIC.finditer(line):
        op = found[1]
        other = {"*": "+", "/": "%", "%": "/"}[op]
        rules = (f"`{op}` of indices swapped for `{other}`",)
        yield Edit(*found.span(), f" {op}mutants::Index<{{0}}>{{{{}}}}{op} ", rules)
    for pattern, others in ((_AXIS, _OTHER_AXIS), (_OFFSET, _OTHER_OFFSET)):
        for found in pattern.finditer(line):
            of, name, other = found[1], found[2], others[found[2]]
            replacement = f"mutants::swapped<{{0}}>({of}.{name}, {of}.{other})"
            yield Edit(*found.span(), replacement, (f"`{of}.{name}` swapped for `.{other}`",))
    for found in _AND.finditer(line):
        yield Edit(found.end(), found.end(), "mutants::alive({0}) | ", ("mask widened: right side of `&&` dropped",))
    for found in _IF.finditer(line):
        opening = found.end() - 1
        try:
            closing = _closing(line, opening)
        except ValueError:
            continue  # the condition goes on in the next line
        yield Edit(found.end(), found.end(), "mutants::alive({0}) || (", ("mask widened: condition always holds",))
        yield Edit(closing, closing, ")", ())
    for found in _MASKED_VALUE.finditer(line):
        yield Edit(found.start(1), found.start(1), "mutants::alive({0}) || ", ("mask widened: `?` always holds",))


def _mutable_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that may have mutants, with their numbers; functions that the compiler evaluates have none."""
    evaluated = False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"(?:inline )?constexpr\b.*\{$", line):
            evaluated = True
        if line == "}":
            evaluated = False
        if not evaluated and not _EVALUATED_BY_COMPILER.search(line):
            yield number, line


def rewrite(text: str, file: str, first: int) -> tuple[str, list[Mutant]]:
    """The text with all its mutants, which are numbered from `first` on."""
    lines = text.splitlines()
    mutants: list[Mutant] = []
    for number, line in _mutable_lines(text):
        code = line.split("//")[0].rstrip()
        new = ""
        position = 0
        for edit in sorted(_edits(code), key=lambda edit: (edit.begin, edit.end)):
            if edit.begin < position:
                continue  # inside another mutant
            new += code[position : edit.begin] + edit.replacement.format(first + len(mutants))
            position = edit.end
            for rule in edit.rules:
                mutants.append(Mutant(first + len(mutants), file, number, rule, line))
        lines[number - 1] = new + code[position:]
    return '#include "mutants.h"\n' + "\n".join(lines) + "\n", mutants


def kernel_sources(csrc: Path) -> list[Path]:
    """What kernels are made of, and how they are launched; not the thin layer, which the emulator replaces, nor what it
    cannot run."""
    layer = {"hardware.cuh", "async_copy.cuh", "matrix_product.cuh", "host.h"}
    patterns = ("cuda/**/*.cuh", "cuda/*/*.h", "cuda/*/*.cu", "geometry/*.h")
    paths = [path for pattern in patterns for path in csrc.glob(pattern)]
    return sorted(path for path in paths if path.name not in layer and path.parent.name != "cutlass")
