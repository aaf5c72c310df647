"""The Python blocks of the README run, in order, as a newcomer would paste them."""

from __future__ import annotations

import re
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
