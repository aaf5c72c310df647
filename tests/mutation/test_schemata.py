"""The rules find what they should, and the record of `make mutate` is the one that the documentation explains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.mutation.schemata import kernel_sources, rewrite

_ROOT = Path(__file__).resolve().parents[2]
_RECORD = _ROOT / "benchmarks" / "results" / "mutation.json"
_DOCUMENT = _ROOT / "docs" / "testing-without-a-gpu.md"


@pytest.mark.parametrize(
    ("line", "rules"),
    [
        ("  block_barrier();", ["barrier dropped"]),
        ("  x = a < b;", ["`<` flipped", "`<` loosened"]),
        ("  x = a >= b;", ["`>=` flipped", "`>=` tightened"]),
        ("  x = a == b;", ["`==` flipped"]),
        ("  x = a * b / c % d;", [f"`{a}` of indices swapped for `{b}`" for a, b in ("*+", "/%", "%/")]),
        ("  x = grid.h;", ["`grid.h` swapped for `.w`"]),
        ("  x = site.strides.head;", ["`site.strides.head` swapped for `.w`"]),
        ("  x = begin.key;", ["`begin.key` swapped for `.query`"]),
        ("  x = a && b;", ["mask widened: right side of `&&` dropped"]),
        ("  if (f(x)) return;", ["mask widened: condition always holds"]),
        ("  x = wanted ? a : b;", ["mask widened: `?` always holds"]),
        ("  grid.h = 3;", []),
        ("  if constexpr (a < b) return;", []),
        ("  static_assert(a < b);", []),
        ("  T* p = *q;  // a < b", []),
        ("  x = Layout<T, 3>{};", []),
    ],
)
def test_rules(line, rules):
    text, mutants = rewrite(line, "file", 7)
    assert [mutant.rule for mutant in mutants] == rules
    assert [mutant.number for mutant in mutants] == list(range(7, 7 + len(rules)))
    assert (line.split("  //")[0] in text) == (not rules)


def test_functions_that_the_compiler_evaluates_have_no_mutants():
    text = "constexpr int f(int x) {\n  return x < 3;\n}\nint g(int x) {\n  return x < 3;\n}\n"
    assert {mutant.line for mutant in rewrite(text, "file", 0)[1]} == {5}


def test_every_kernel_has_mutants():
    for path in kernel_sources(_ROOT / "csrc"):
        if path.suffix == ".cuh" and path.name != "problem.cuh":
            assert rewrite(path.read_text(), path.name, 0)[1], path


def test_survivors_are_explained():
    """What the document quotes and lists is what the record holds, and it is within what was asked for."""
    if not _RECORD.exists():
        pytest.skip("no complete run of `make mutate` has been recorded yet")
    record = json.loads(_RECORD.read_text())
    text = _DOCUMENT.read_text()
    assert f"caught {record['caught']} of {record['mutants']}" in text
    assert record["commit"] in text
    assert record["mutants"] >= 40
    assert record["caught"] >= 0.9 * record["mutants"]
    explained = re.findall(r"^- ``(.*?)``$", text, re.M)
    assert sorted(explained) == sorted(record["survivors"])
