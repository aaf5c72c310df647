"""docs/integrations.md: its Python blocks run in order; its table is that of the record."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import integrations as benchmark
from benchmarks.measure import Rounds
from tests.integrations.families import FAMILIES


def test_code_blocks_run(capsys):
    text = benchmark.PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(benchmark.PAGE), "exec"), names)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(LLaVA-ST's packers.*?)```", text, re.DOTALL)
    assert shown in printed
    assert "no module of the model looks like one" in printed  # of Cambrian's
    for name in ("TokenPacker", "Oryx"):
        assert re.search(rf"{name}.*: 1 replaced, 0 skipped", printed)


def test_the_table_is_that_of_its_record():
    text = benchmark.PAGE.read_text()
    assert benchmark.page(text, json.loads(benchmark.RECORD.read_text())) == text


@pytest.mark.parametrize("mode", benchmark.MODES)
@pytest.mark.parametrize("name", ["token_packer, scale 2", "oryx, video", "vision_sampler"])
def test_a_case_is_measured_and_shown(name, mode):
    family = FAMILIES[name]
    case = benchmark.Case("small", family.make, family.accelerate, family.inputs)
    measurements = benchmark.measure_case(case, mode, Rounds(2, 2, 0))
    assert [len(m["samples_ms"]) for m in measurements] == [2, 2]
    assert all(0 <= m["errors"]["output"] < 1e-4 for m in measurements)
    record = {
        "environment": benchmark.describe(torch.device("cpu")),
        "cases": [{"name": measurements[0]["case"]}],
        "measurements": measurements,
    }
    assert f"| small, {mode} |" in benchmark.table(record)
