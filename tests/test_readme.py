"""The README: its Python blocks run in order, as a newcomer would paste them; its figures are those of a record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .docs.code_blocks import blocks, run_python

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_run():
    assert len(blocks(README, "python")) >= 3
    names = run_python(README)
    assert names["output"].shape == (1, 8, 9, 9, 8, 128)
    assert names["slow"].shape == (1, 2, 9, 9, 64)
    assert names["fast"].shape == (1, 10, 3, 3, 64)
    assert names["answer"].text


def test_the_measured_tables_are_those_of_the_records():
    command = [sys.executable, "-m", "benchmarks.site", "--check"]
    result = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
