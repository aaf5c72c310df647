"""docs/integrations.md: its Python blocks run in order; the cases of its table compute what they should."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import integration_workloads as benchmark
from benchmarks import parity
from benchmarks.cases import MODES
from benchmarks.environment import ROOT
from tests.integrations.families import FAMILIES

PAGE = ROOT / "docs" / "integrations.md"


def test_code_blocks_run(capsys):
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(LLaVA-ST's packers.*?)```", text, re.DOTALL)
    assert shown in printed
    assert "no module of the model looks like one" in printed  # of Cambrian's
    for name in ("TokenPacker", "Oryx"):
        assert re.search(rf"{name}.*: 1 replaced, 0 skipped", printed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["token_packer, scale 2", "oryx, video", "vision_sampler"])
def test_a_case_compares_what_it_should(name, mode):
    family = FAMILIES[name]
    case = benchmark.Case("small", family.make, family.accelerate, family.inputs)
    workload = benchmark.integration_workload(case, mode, torch.device("cpu"))
    assert workload.name == f"small, {mode}"
    expected = workload.truth()
    assert ("grad_input_1" in expected) == (mode != "forward")
    found = {
        contender.name: parity.errors(contender.call()[: len(expected)], expected) for contender in workload.contenders
    }
    assert found.keys() == {benchmark.BEFORE, benchmark.AFTER}
    assert parity.within_tolerance(found[benchmark.AFTER], found[benchmark.BEFORE], expected, torch.float32)
