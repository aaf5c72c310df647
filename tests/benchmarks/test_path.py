"""The whole path in the benchmark, and the page that is generated from what it finds."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import folding_error, folding_report, path_workloads
from benchmarks.cases import MODES
from benchmarks.kept_memory import kept_channels, ways
from benchmarks.path_published import PublishedPath, tokenizer_like

SIZES = (12, 24, 32, 4, 10)  # vision channels, channels, packer's width, heads, anchors


@pytest.mark.parametrize("execution", ["direct", "folded"])
def test_published_path_is_ours_with_the_same_weights(execution):
    published = PublishedPath(*SIZES).double()
    ours = tokenizer_like(published, execution=execution)
    features = torch.randn(1, 5, 9, 9, SIZES[0], dtype=torch.float64)
    torch.testing.assert_close(ours(features), published(features), rtol=1e-12, atol=1e-12)
    for module in (published, ours):
        sum(stream.square().sum() for stream in module(features)).backward()
    torch.testing.assert_close(ours.lape.width_output.grad, published.tables[5].grad, rtol=1e-9, atol=1e-9)
    found, wanted = ours.packer.spatial.key_mlp[0].weight.grad, published.packer.token_packer.to_k[0].weight.grad
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_workload(monkeypatch):
    """Every contender runs and agrees, at sizes that are affordable here."""
    for name, value in zip(("VISION", "WIDTH", "EMBED", "HEADS", "ANCHORS"), SIZES, strict=True):
        monkeypatch.setattr(path_workloads, name, value)
    monkeypatch.setattr(
        path_workloads, "patch_features", lambda clip, frames, width, device: torch.randn(1, frames, 27, 27, width)
    )
    for mode in MODES:
        workload = path_workloads.path_workload(5, mode, None, torch.device("cpu"))
        truth = workload.truth()
        for contender in workload.contenders:
            if contender.checked and "compiled" not in contender.name:
                results = contender.call()
                for found, wanted in zip(results, truth.values(), strict=False):
                    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
                assert len(results) > 2 if mode != "forward" else len(results) == 2
        assert workload.description["flops_folded"] > 0


def test_products_at_the_sizes_of_the_paper():
    """By hand, per frame: what the tables of DESIGN and docs rest on."""
    tokens, centres, fast, slow = 729, 81, 9, 81 / 5
    wide, vision, embed = 3584, 1152, 1024
    attention = 2 * embed  # scores and weighted sum of a key, for all heads together

    def published(keys, queries):
        mlp = wide * embed + embed * embed
        return keys * (2 * mlp + 2 * embed**2 + attention) + queries * (mlp + 2 * embed**2 + embed * wide)

    projector = tokens * (vision * wide + wide * wide)
    macs = projector + published(tokens, centres) + published(centres, slow) + published(centres, fast)
    counted = path_workloads.path_flops(100, "forward", folded=False)
    assert counted == pytest.approx(2 * 100 * macs, rel=0.002)
    assert path_workloads.path_flops(100, "forward", folded=True) < 0.6 * counted


def test_what_training_keeps():
    """The budget: the hidden activation, the two preactivations, and raw keys and values; per raw token."""
    vision, wide, embed = SIZES[:3]
    found = {name: kept_channels(make, vision) for name, make in ways(*SIZES).items()}
    assert found["folded"] == wide + 4 * embed
    assert found["folded, recompute"] == 4 * embed
    assert found["published"] > found["folded"]


def test_errors_on_record():
    """Every regime and dtype, 20 draws each: the folded execution is as exact as the direct one."""
    rows = json.loads(folding_error.RECORD.read_text())["rows"]
    assert {(row["regime"], row["dtype"]) for row in rows} == {
        (regime, dtype) for regime in folding_error.REGIMES for dtype in folding_error.DTYPES
    }
    for row in rows:
        assert len(row["folded"]) == len(row["direct"]) >= 20
        assert row["median_ratio"] <= 1
        if row["regime"] != "alike rows":  # beyond what training gives: docs/folding.md
            assert row["largest_ratio"] <= 1.2


def test_errors_again():
    """A few draws of the record anew: other machines sum in other orders, so not to the digit."""
    rows = {(row["regime"], row["dtype"]): row for row in json.loads(folding_error.RECORD.read_text())["rows"]}
    for regime in ("initial", "large tables"):
        folded, direct = folding_error.error_ratio(regime, torch.float16, seed=3)
        row = rows[regime, "float16"]
        assert folded == pytest.approx(row["folded"][3], rel=0.2)
        assert direct == pytest.approx(row["direct"][3], rel=0.2)


def test_the_page_is_up_to_date():
    assert folding_report.main(["--check"]) == 0
