"""The commands behind `make reproduce` and `make ablate`, on a handful of clips."""

from __future__ import annotations

import json

import pytest
from llava_st.pipeline import LlavaStPipeline

from benchmarks import reproduction, reproduction_report


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Records and documents go here, and little is proved."""
    folder = tmp_path / "results"
    folder.mkdir()
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures:begin -->\n<!-- figures:end -->\nafter\n")
    for name, value in (
        ("RESULTS", folder),
        ("PAGE", page),
        ("CURVES", tmp_path / "curves.png"),
        ("ANSWERS", tmp_path / "answers.png"),
        ("_ANSWERED", (7, (0, 1))),
    ):
        monkeypatch.setattr(reproduction_report, name, value)
    monkeypatch.setattr(reproduction, "PROOF_CLIPS", 2)
    monkeypatch.setattr(reproduction, "ABLATION_PROOF_CLIPS", 2)
    monkeypatch.setattr(reproduction, "UNTRAINED_CLIPS", 2)
    monkeypatch.setattr(reproduction, "_VALIDATION_CLIPS", 2)
    monkeypatch.setattr(reproduction, "PROOF_SEED", 7)
    return tmp_path


def test_a_training_leaves_a_record_a_checkpoint_and_a_page(results, monkeypatch):
    checkpoint = results / "checkpoint"
    arguments = ["--out", str(results / "run"), "train", "--seed", "2", "--clips", "6"]
    assert reproduction.main(arguments) == 0
    assert (results / "run" / "seed2-6" / "checkpoint").is_dir(), "other seeds leave the one that comes along alone"
    assert not (results / "answers.png").exists()
    monkeypatch.setattr(reproduction, "_PUBLISHED_SEED", 2)
    assert reproduction.main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    record = json.loads((results / "results" / "reproduction-seed2.json").read_text())
    assert record["clips"] == {"names": 6, "places": 6, "tubes": 6}
    assert record["proof"].keys() == {"seed", "clips", "constant", "a", "b", "c"}
    assert record["untrained"] == {"clips": 2, "m_tiou": 0, "m_siou": 0, "m_viou": 0}
    assert all(any("loss" in entry for entry in curve) for curve in record["curves"].values())
    assert any("eval/stvg m_tIoU" in entry for entry in record["curves"]["tubes"])
    assert (results / "curves.png").stat().st_size > 1000
    assert (results / "answers.png").stat().st_size > 1000
    page = (results / "page.md").read_text()
    assert "**Seed 2**" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    weights = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert weights < 8e6
    assert LlavaStPipeline.from_pretrained(checkpoint).model.dtype.itemsize == 2


def test_an_ablation_goes_on_where_records_are_missing(results):
    arguments = ["--out", str(results / "run"), "ablate", "--seeds", "0", "--arms", "hard targets", "--clips", "2"]
    assert reproduction.main(arguments) == 0
    file = results / "results" / "reproduction-ablation-hard-targets-0.json"
    record = json.loads(file.read_text())
    assert record["arm"] == "hard targets"
    assert "| hard targets | the nearest anchor is the target | 1, missing 1, 2 |" in (results / "page.md").read_text()
    left = [path.name for path in (results / "run").iterdir()]
    assert left == ["ablation-0-2-2-2"], "a run that has its record is removed; what other arms need stays"
    written = file.stat().st_mtime_ns
    assert reproduction.main(arguments) == 0
    assert file.stat().st_mtime_ns == written
