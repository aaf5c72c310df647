"""Pages show what their records say; what the measurement compares is the same function."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from benchmarks import model_costs, record_memory, reproduction_report, synthesis, training_throughput, walk_through
from benchmarks.environment import ROOT


@pytest.mark.parametrize("source", [model_costs, record_memory, synthesis, training_throughput, walk_through])
def test_the_page_is_that_of_its_record(source):
    text = source.PAGE.read_text()
    assert source.page(text, json.loads(source.RECORD.read_text())) == text


def test_the_reproduction_is_that_of_its_records():
    text = reproduction_report.PAGE.read_text()
    runs, arms = reproduction_report.runs(), reproduction_report.ablations()
    assert reproduction_report.page(text, runs, arms) == text


def test_the_walk_takes_the_steps_of_the_readme(monkeypatch, tmp_path):
    readme = (ROOT / "README.md").read_text()
    commands = walk_through.commands(readme)
    assert commands[0] == "python3 -m venv venv && . venv/bin/activate"
    assert commands[-1] == "cd .. && python -m llava_st_ops.info"
    monkeypatch.setenv("TORCH", "torch==2.10.0")
    tried = [walk_through.as_tried(command) for command in commands]
    assert tried[1] == 'pip install "torch==2.10.0"'
    assert [one for one in tried[2:] if one.removeprefix("LLAVA_ST_CUDA=off ") not in commands] == []
    (tmp_path / "own_model.py").write_text(walk_through.OWN_MODEL.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    small = walk_through.program(readme).replace("1024, 5120, 1024, 8, 4096", "32, 64, 16, 2, 24")
    names = {}
    exec(small.replace("576, 1024", "576, 32").replace("576, 5120", "576, 64"), names)
    assert names["after"] is not names["before"]
    for text in ("# Nothing", "## Install\n\nby hand"):
        with pytest.raises(ValueError, match="README"):
            walk_through.commands(text)
    with pytest.raises(ValueError, match="README"):
        walk_through.program("no code")


def test_a_step_that_fails_ends_the_walk(tmp_path):
    found = walk_through._run("echo one; echo two; echo three", tmp_path)
    assert found["said"] == ["two", "three"]
    with pytest.raises(RuntimeError, match="no such thing"):
        walk_through._run("echo no such thing; exit 3", tmp_path)


def test_arms_without_runs_are_missing():
    scores = {"m_tiou": 0.5, "m_siou": 0.25, "m_viou": 0.125}
    proof = {"clips": 100, "a": scores, "b": scores, "constant": scores, "c": {"new": 0.75, "old": 0}}
    arms = {"baseline": {1: {"clips": {"names": 9}, "proof": proof}}, "direct": {}}
    text = reproduction_report._arms(arms)
    assert "each from 9 (names) clips" in text
    assert "The baseline of seed 1, shown another clip: 0.500, 0.250, 0.125." in text
    rows = text.splitlines()
    assert rows[-2].endswith("| 1, missing 0, 2 | 0.500 | 0.250 | 0.125 | 0.750 |")
    assert rows[-1].endswith("| 0, missing 0, 1, 2 | missing | missing | missing | missing |")
    assert reproduction_report._arms({"direct": {}}).splitlines()[-1] == rows[-1]
    record = {"clips": {"names": 9}, "proof": proof}
    seeds = {seed: record for seed in (0, 1)}
    assert "Folded and direct agree in m_sIoU: 0.000 apart" in reproduction_report._arms(
        {"baseline": seeds, "direct": seeds}
    )
    other = {**record, "proof": {**proof, "a": {**scores, "m_siou": 0.0}}}
    assert "Folded and direct differ in m_sIoU: 0.250 apart" in reproduction_report._arms(
        {"baseline": seeds, "direct": {0: other, 1: other}}
    )
    arms["direct"] = {1: {"clips": {"names": 8}, "proof": proof}}
    with pytest.raises(ValueError, match="one number of clips"):
        reproduction_report._arms(arms)


def test_a_published_step_is_ours_with_matrices_joined(monkeypatch):
    monkeypatch.setattr(model_costs, "VOCABULARY", 5000)
    monkeypatch.setattr(model_costs, "WIDTH", 28)
    model = model_costs.decoding_model(layers=1)
    allocated = []
    with torch.no_grad():
        logits = []
        for way in (model_costs.published_step, model_costs.our_step):
            cache = DynamicCache(config=model.config.text_config)
            model(input_ids=torch.tensor([[1, 2, 3]]), cache=cache)
            token = torch.tensor([[5000 + 117]])
            way(model, token, cache)
            with model_costs.AllocatedBytes() as counter:
                logits.append(way(model, token, cache))
            allocated.append(counter.total)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    matrix = model.lm_head.weight.nbytes
    assert allocated[0] > 2 * matrix
    assert allocated[1] < matrix
