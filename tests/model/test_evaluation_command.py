"""`python -m llava_st.evaluate`: a small random model is asked about real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from llava_st import evaluate
from llava_st.evaluation.pipeline_predictor import PipelinePredictor
from llava_st.evaluation.predictions import read_predictions
from llava_st.evaluation.samples import Sample
from llava_st.geometry import Box, TimeSpan
from llava_st.pipeline import LlavaStPipeline
from llava_st.tiny import tiny_model, tiny_processor
from PIL import Image

from .annotations import refcoco_content, st_align_record, write_json
from .clips import moving_square, write_video


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mkv", moving_square(40))
    (folder / "broken.mkv").write_bytes(b"this is no video" * 64)
    for i in range(2):
        Image.fromarray(np.full((40, 80, 3), 100 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline() -> LlavaStPipeline:
    return LlavaStPipeline(tiny_model(), tiny_processor())


@pytest.fixture
def command(monkeypatch, media, pipeline, tmp_path):
    """Runs the command with the small model and gives the report."""
    monkeypatch.setattr(LlavaStPipeline, "from_pretrained", classmethod(lambda cls, path, **options: pipeline))

    def run(task: str, data: Path, *options: str) -> dict:
        asked = ["--model", "tiny", "--media", str(media), "--max-new-tokens", "12"]
        arguments = ["--task", task, "--data", str(data), "--out", str(tmp_path / "out.jsonl")]
        assert evaluate.main([*arguments, *asked, *options]) == 0
        return json.loads((tmp_path / "out.report.json").read_text())

    return run


def data_for(task: str, folder: Path) -> Path:
    if task == "rec":
        content = refcoco_content(3)
    elif task == "tvg":
        content = [{"image_id": name, "caption": "x", "timestamp": [0.1, 1.2]} for name in ("a", "broken", "none")]
    else:
        videos = ("a.mkv", "broken.mkv", "none.mkv")
        content = [st_align_record(task, video) for video in videos]
    return write_json(folder / f"{task}.json", content)


@pytest.mark.parametrize("task", ["stvg", "svg", "elc", "tvg", "rec"])
def test_a_model_is_asked_and_scored(tmp_path, command, task, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no java: METEOR takes seconds to start
    data = data_for(task, tmp_path)
    report = command(task, data)
    predictions = read_predictions(tmp_path / "out.jsonl")
    assert [prediction.index for prediction in predictions] == [0, 1, 2]
    assert predictions[0].media is not None
    assert predictions[0].error is None
    if task == "rec":
        assert [prediction.error and prediction.error.kind for prediction in predictions] == [None, None, "missing"]
    else:
        assert [prediction.error and prediction.error.kind for prediction in predictions[1:]] == [
            "undecodable",
            "missing",
        ]
        assert predictions[0].media.indices[0] == (0 if task == "tvg" else 10)
        assert "broken.mkv" in report["undecodable"][0]["reason"]
    assert report["complete"]
    assert report["counts"]["missing"] == 1
    assert report["data"] == str(data)
    assert f"{task.upper()}, standard metrics" in capsys.readouterr().out


def test_it_goes_on_where_it_ended(tmp_path, command, capsys):
    data = data_for("rec", tmp_path)
    assert command("rec", data, "--limit", "1")["counts"]["samples"] == 1
    first = (tmp_path / "out.jsonl").read_bytes()
    assert command("rec", data)["counts"]["samples"] == 3
    assert (tmp_path / "out.jsonl").read_bytes().startswith(first)
    with pytest.raises(SystemExit):
        command("rec", data, "--seed", "1")
    assert "other settings: seed was 0, now 1" in capsys.readouterr().err


def test_media_are_looked_for_again_on_demand(tmp_path, command, media):
    data = data_for("rec", tmp_path)
    missing = tmp_path / "few"
    missing.mkdir()
    assert command("rec", data, "--media", str(missing))["counts"]["missing"] == 3
    assert command("rec", data)["counts"]["missing"] == 3
    assert command("rec", data, "--retry-errors")["counts"]["missing"] == 1


def test_files_without_usable_records(tmp_path, capsys):
    data = write_json(tmp_path / "data.json", [{}])
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "stvg", "--data", str(data), "--score-only"])
    error = capsys.readouterr().err
    assert "has no usable records" in error
    assert "record 0: video_path: expected this field" in error


def test_a_folder_without_a_model(tmp_path, capsys):
    data = data_for("rec", tmp_path)
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "rec", "--data", str(data), "--media", str(tmp_path), "--model", str(tmp_path)])
    assert "no file named" in capsys.readouterr().err.splitlines()[-1]


def test_scoring_alone_needs_no_model(tmp_path, command, monkeypatch, capsys):
    data = data_for("tvg", tmp_path)
    first = command("tvg", data)
    monkeypatch.setattr(LlavaStPipeline, "from_pretrained", None)
    arguments = ["--task", "tvg", "--data", str(data), "--out", str(tmp_path / "out.jsonl"), "--score-only"]
    assert evaluate.main(arguments) == 0
    assert json.loads((tmp_path / "out.report.json").read_text()) == first
    assert evaluate.main([*arguments, "--metrics", "published"]) == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["metrics"] == "published"


def test_published_metrics_take_the_first_2000_records_of_st_align(tmp_path, command, monkeypatch):
    monkeypatch.setattr(evaluate, "PUBLISHED_LIMIT", 2)
    data = data_for("stvg", tmp_path)
    assert command("stvg", data, "--metrics", "published")["counts"]["samples"] == 2
    assert command("stvg", data, "--metrics", "published", "--limit", "3")["counts"]["samples"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "rec", "--data", "none.json", "--score-only"], "none.json"),
        (["--task", "rec", "--data", "none.json"], "--model and --media are needed"),
        (["--task", "qa", "--data", "none.json", "--score-only"], "invalid choice: 'qa'"),
        (["--task", "rec", "--data", "none.json", "--score-only", "--limit", "0"], "expected a positive number"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_batches_and_shared_media_change_no_answer(media, pipeline):
    """Samples of one video, a broken one between them, together and one by one."""
    names = ["a", "broken", "a", "none", "a"]
    spans = [TimeSpan(0.1 * i, 0.5) for i in range(len(names))]
    samples = [
        Sample(i, f"{name}#{i}", "tvg", name, ("What is in", span, "?"), span, in_seconds=True)
        for i, (name, span) in enumerate(zip(names, spans, strict=True))
    ]
    together = PipelinePredictor(pipeline, media, max_new_tokens=8).predict(samples)
    one_by_one = PipelinePredictor(pipeline, media, max_new_tokens=8)
    for sample, prediction in zip(samples, together, strict=True):
        (other,) = one_by_one.predict([sample])
        assert other.text == prediction.text
        assert other.positions == pytest.approx(prediction.positions, abs=1e-4)
        assert (other.error, other.media, other.id) == (prediction.error, prediction.media, sample.id)
    assert [prediction.error is None for prediction in together] == [True, False, True, False, True]
    assert all(0 <= position <= 1 for prediction in together for position in prediction.positions)


def test_media_are_encoded_once_for_samples_in_a_row(media, pipeline, monkeypatch):
    encoded = []
    encode = pipeline.encode_image
    monkeypatch.setattr(pipeline, "encode_image", lambda source: encoded.append(1) or encode(source))
    samples = [Sample(i, f"0.png#{i}", "rec", "0.png", ("the dog",), Box(0, 0, 1, 1)) for i in range(3)]
    predictor = PipelinePredictor(pipeline, media, max_new_tokens=2)
    predictor.predict(samples[:2])
    predictor.predict(samples[2:])
    assert len(encoded) == 1


def test_errors_of_the_model_are_not_taken_for_bad_media(media, pipeline, monkeypatch):
    def fail(source):
        raise ValueError("the model is broken")

    monkeypatch.setattr(pipeline, "encode_image", fail)
    sample = Sample(0, "0.png#0", "rec", "0.png", ("the dog",), Box(0, 0, 1, 1))
    with pytest.raises(ValueError, match="the model is broken"):
        PipelinePredictor(pipeline, media).predict([sample])


def test_a_saved_model_is_loaded(tmp_path, media, pipeline):
    folder = tmp_path / "model"
    pipeline.model.save_pretrained(folder)
    pipeline.processor.save_pretrained(folder)
    data = write_json(tmp_path / "rec.json", refcoco_content(2))
    common = ["--task", "rec", "--data", str(data), "--media", str(media), "--max-new-tokens", "4"]
    out = tmp_path / "out.jsonl"
    assert evaluate.main([*common, "--model", str(folder), "--out", str(out), "--batch-size", "2"]) == 0
    assert len(read_predictions(out)) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model",
        "out.jsonl",
        "out.report.json",
        "out.run.json",
        "rec.json",
    ]
    shutil.rmtree(folder)
