"""Scores and reports: oracles reach 100 %, and what goes wrong is counted and listed."""

from __future__ import annotations

import json

import pytest
from llava_st.coordinate_text import write
from llava_st.evaluation.datasets import EVALUATED_TASKS, read_dataset
from llava_st.evaluation.metrics import EventTruth, TubeTruth
from llava_st.evaluation.predictions import MediaError, Prediction, read_predictions
from llava_st.evaluation.records import Dataset
from llava_st.evaluation.report import format_report
from llava_st.evaluation.runner import predict_all
from llava_st.evaluation.samples import Sample
from llava_st.evaluation.scoring import score
from llava_st.geometry import Box, Instant, TimeSpan
from llava_st.media import Media
from llava_st.tasks import TASKS, Event, SpatioTemporal
from llava_st.tiny import tiny_processor
from llava_st.video import sample_frame_indices

from .annotations import refcoco_content, st_align_record, write_json


def media_of(sample: Sample) -> Media:
    """Ten frames of a clip with 20 frames per second."""
    if TASKS[sample.task].media == "image":
        return Media("image", 80, 40)
    indices = tuple(sample_frame_indices(sample.clip or (0, 199), 10))
    return Media("video", 64, 48, tuple(i / 20 for i in indices), indices)


def perfect_value(sample: Sample, media: Media):
    truth = sample.truth_for(media)
    if isinstance(truth, TubeTruth):
        return truth.tube()
    if isinstance(truth, EventTruth) and sample.task == "elc":
        return Event(Instant(truth.span.end), truth.caption, truth.tube.tube())
    return SpatioTemporal(truth.span, truth.tube.tube()) if isinstance(truth, EventTruth) else truth


class Oracle:
    """Says what is right: the answer goes through the processor to ids and positions, and back."""

    def __init__(self):
        self.processor = tiny_processor()

    def predict(self, samples):
        return [self.answer(sample) for sample in samples]

    def answer(self, sample: Sample) -> Prediction:
        media = media_of(sample)
        answer = TASKS[sample.task].answer(perfect_value(sample, media))
        user = {"role": "user", "content": list(sample.prompt), "unit": "fraction"}
        said = {"role": "assistant", "content": [write(answer, "output")]}
        inputs = self.processor.apply_chat_template([user, said], return_labels=True)
        learned = inputs["labels"][0] >= 0
        read = self.processor.read_ids(inputs["input_ids"][0, learned], inputs["positions"][0, learned])
        return Prediction(sample.index, sample.id, read.text, read.positions, finished=True, media=media)


def make_dataset(tmp_path, task: str) -> Dataset:
    if task == "rec":
        content = refcoco_content(3)
    elif task == "tvg":
        content = [{"image_id": "a", "caption": "cook", "timestamp": span} for span in ([0.5, 2.0], [0, 9.95], [3, 3])]
    else:
        later = {"<s>": 12, "<e>": 29}
        content = [st_align_record(task), st_align_record(task, time_token=later), st_align_record(task, "b.mkv")]
    return read_dataset(task, write_json(tmp_path / f"{task}.json", content))


@pytest.fixture
def captions(monkeypatch):
    """The pairs of captions that were to be scored, in place of scores: METEOR takes seconds to start."""
    seen = []
    monkeypatch.setattr("llava_st.evaluation.scoring.score_captions", lambda pairs: seen.append(pairs) or ({}, {}))
    return seen


@pytest.mark.parametrize("task", EVALUATED_TASKS)
def test_oracles_are_right(tmp_path, task, captions):
    dataset, out = make_dataset(tmp_path, task), tmp_path / "out.jsonl"
    predict_all(dataset.samples, Oracle(), out, batch_size=2)
    report = score(dataset, read_predictions(out))
    counts = report["counts"]
    assert report["complete"]
    assert counts.pop("samples") == counts.pop("predicted") == 3
    assert set(counts.values()) == {0}
    assert len(report["scores"]) >= 1
    assert report["scores"] == pytest.approx(dict.fromkeys(report["scores"], 100))
    if task == "elc":
        assert captions == [[("a man, in a hat, rides a bike",) * 2] * 3]
    json.dumps(report, allow_nan=False)


def replay(dataset: Dataset, *changes) -> list[Prediction]:
    """The oracle's predictions, the last ones changed."""
    oracle = Oracle()
    samples = dataset.samples
    kept = [oracle.answer(sample) for sample in samples[: len(samples) - len(changes)]]
    return kept + [
        Prediction(sample.index, sample.id, **change)
        for sample, change in zip(samples[-len(changes) :], changes, strict=True)
    ]


MISSING = {"error": MediaError("missing", "b.mkv: no such video file")}
UNDECODABLE = {"error": MediaError("undecodable", "a.mkv: cannot be decoded as a video")}
UNPARSABLE = {"text": "I do not know. <TEMP-OUTPUT>", "positions": (0.5,)}


@pytest.mark.parametrize("task", ["stvg", "svg", "tvg", "rec"])
def test_media_that_cannot_be_shown_are_wrong_and_left_out_in_published_metrics(tmp_path, task):
    dataset = make_dataset(tmp_path, task)
    predictions = replay(dataset, UNDECODABLE, MISSING)
    report = score(dataset, predictions)
    assert report["scores"] == pytest.approx(dict.fromkeys(report["scores"], 100 / 3))
    assert report["missing"] == [{"index": 2, "id": dataset.samples[2].id, "reason": "b.mkv: no such video file"}]
    assert [entry["index"] for entry in report["undecodable"]] == [1]
    counts = report["counts"]
    assert (counts["missing"], counts["undecodable"], counts["unparsable"], counts["predicted"]) == (1, 1, 0, 3)
    published = score(dataset, predictions, "published")
    assert published["scores"]
    assert min(published["scores"].values()) > 99
    assert published["counts"] == counts


def test_nothing_to_score_is_absent(tmp_path):
    dataset = make_dataset(tmp_path, "tvg")
    report = score(dataset, replay(dataset, MISSING, MISSING, MISSING), "published")
    assert report["scores"] == {}
    assert report["absent"]["mIoU"] == "there are no samples to score"


@pytest.mark.parametrize("metrics", ["standard", "published"])
def test_unparsable_answers_are_wrong_and_listed(tmp_path, metrics):
    dataset = make_dataset(tmp_path, "stvg")
    report = score(dataset, replay(dataset, UNPARSABLE), metrics)
    assert report["scores"]["m_tIoU"] == pytest.approx(200 / 3, abs=0.1)
    (entry,) = report["unparsable"]
    assert (entry["index"], entry["answer"]) == (2, "I do not know. 0.500")
    assert "expected a span" in entry["reason"]
    assert report["counts"]["unfinished"] == 1


def test_elc_captions(tmp_path, captions):
    """Wrong answers have empty captions; published metrics keep a part of them, and leave out media not shown."""
    dataset = make_dataset(tmp_path, "elc")
    predictions = replay(dataset, UNPARSABLE, MISSING)
    score(dataset, predictions)
    score(dataset, predictions, "published")
    caption = "a man, in a hat, rides a bike"
    assert captions[0] == [(caption, caption), ("", caption), ("", caption)]
    assert captions[1] == [("rides a bike", caption), ("", caption)]


def test_elc_reports_caption_scores_and_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llava_st.evaluation.scoring.score_captions", lambda _: ({"CIDEr": 12.5}, {"METEOR": "no java"})
    )
    dataset = make_dataset(tmp_path, "elc")
    report = score(dataset, replay(dataset, {}))
    assert report["scores"]["CIDEr"] == 12.5
    assert "METEOR" not in report["scores"]
    text = format_report(report)
    assert "absent: METEOR: no java" in text.splitlines()
    assert any(line.split() == ["METEOR", "absent"] for line in text.splitlines())


def test_samples_without_prediction_make_a_report_incomplete(tmp_path):
    dataset = make_dataset(tmp_path, "tvg")
    report = score(dataset, replay(dataset, {})[:2])
    assert not report["complete"]
    assert (report["counts"]["samples"], report["counts"]["predicted"]) == (3, 2)
    assert report["scores"]["mIoU"] == pytest.approx(100)
    assert "NOT COMPLETE: 2 of 3 samples" in format_report(report)
    assert score(dataset, replay(dataset, {})[:2], limit=2)["complete"]


def test_predictions_of_other_data_are_refused(tmp_path):
    dataset = make_dataset(tmp_path, "tvg")
    with pytest.raises(ValueError, match="expected one of 'a#0', got 'z#0'"):
        score(dataset, [Prediction(0, "z#0")])
    with pytest.raises(ValueError, match="metrics"):
        score(dataset, [], "best")
    with pytest.raises(ValueError, match="expected samples, found none"):
        score(dataset, [], limit=0)


def test_report_as_text(tmp_path):
    dataset = make_dataset(tmp_path, "rec")
    dataset = Dataset(dataset.samples, ("data.json, record 7: bbox: expected 4 numbers",), ("a note",))
    text = format_report(score(dataset, replay(dataset, UNPARSABLE, MISSING)))
    assert text.startswith("REC, standard metrics (llava_st ")
    for line in ("  Acc@0.5  33.33", "a note", "  missing      1", "  data.json, record 7: bbox: expected 4 numbers"):
        assert line in text.splitlines()
    assert "unparsable:\n  1.png#1: expected a box" in text


def test_report_shows_the_first_of_long_lists(tmp_path):
    dataset = read_dataset("rec", write_json(tmp_path / "data.json", refcoco_content(9)))
    report = score(dataset, [Prediction(s.index, s.id, "?") for s in dataset.samples])
    text = format_report(report)
    assert "4.png#4" in text
    assert "5.png#5" not in text
    assert "  and 4 more" in text.splitlines()


def test_true_boxes_and_spans_are_of_the_right_picture(tmp_path):
    """An answer that is right for a part alone: intersection and union by hand."""
    samples = (
        Sample(0, "a#0", "tvg", "a", ("?",), TimeSpan(0.0, 0.5)),
        Sample(1, "b#1", "tvg", "b", ("?",), TimeSpan(0.0, 4.975), in_seconds=True),  # half of 9.95 seconds
    )
    said = write([TimeSpan(0.25, 0.5)], "output")
    predictions = [Prediction(s.index, s.id, said.text, said.positions, media=media_of(s)) for s in samples]
    assert score(Dataset(samples), predictions)["scores"]["mIoU"] == pytest.approx(50)
    image = Sample(0, "c#0", "rec", "c", ("?",), Box(0.0, 0.0, 0.5, 1.0))
    said = write([Box(0.0, 0.0, 1.0, 1.0)], "output")
    prediction = Prediction(0, "c#0", said.text, said.positions, media=media_of(image))
    assert score(Dataset((image,)), [prediction])["scores"]["Acc@0.5"] == 100
