"""The README: its Python blocks run in order, as a newcomer would paste them; its figures are those of a record."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["output"].shape == (1, 8, 9, 9, 8, 128)
    assert names["slow"].shape == (1, 2, 9, 9, 64)
    assert names["fast"].shape == (1, 10, 3, 3, 64)
    assert names["answer"].text


def test_the_measured_tables_are_those_of_their_records():
    root = README.parent
    named = dict.fromkeys(re.findall(r"`(benchmarks/results/\S+\.json)`", README.read_text()))
    assert named
    records = [root / record for record in named]
    command = [sys.executable, "-m", "benchmarks.report", *records, "--readme", README, "--check"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
