"""Pages show what their records say; what the measurement compares is the same function."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from benchmarks import model_costs, reproduction_report, synthesis, training_throughput


@pytest.mark.parametrize("source", [model_costs, synthesis, training_throughput])
def test_the_page_is_that_of_its_record(source):
    text = source.PAGE.read_text()
    assert source.page(text, json.loads(source.RECORD.read_text())) == text


def test_the_reproduction_is_that_of_its_records():
    text = reproduction_report.PAGE.read_text()
    runs, arms = reproduction_report.runs(), reproduction_report.ablations()
    assert reproduction_report.page(text, runs, arms) == text


def test_arms_without_runs_are_missing():
    record = {"proof": {"a": {"m_tiou": 0.5, "m_siou": 0.25, "m_viou": 0.125}}}
    rows = reproduction_report._arms({"baseline": {1: record}, "direct": {}}).splitlines()
    assert rows[2].endswith("| 1, missing 0, 2 | 0.500 | 0.250 | 0.125 |")
    assert rows[3].endswith("| 0, missing 0, 1, 2 | missing | missing | missing |")


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
