"""Readers of benchmarks: what they make of records, and what they say of broken ones."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
from llava_st.evaluation.datasets import read_dataset
from llava_st.evaluation.metrics import EventTruth
from llava_st.evaluation.samples import Sample
from llava_st.geometry import Box, Instant, TimeSpan
from llava_st.media import Media
from llava_st.tasks.st_align import SPAN_WORDINGS

from .annotations import refcoco_content, st_align_record, write_json


def read_one(tmp_path, task, content, **options) -> Sample:
    dataset = read_dataset(task, write_json(tmp_path / "data.json", content), **options)
    assert dataset.broken == ()
    assert len(dataset.samples) == 1
    return dataset.samples[0]


def test_stvg(tmp_path):
    sample = read_one(tmp_path, "stvg", [st_align_record("stvg")])
    assert (sample.index, sample.id, sample.task, sample.media) == (0, "a.mkv#0", "stvg", "a.mkv")
    assert sample.clip == (10, 30)
    assert sample.prompt == (
        "At which time does the man ride the bike?Please firstly give the timestamps, and then give the spatial "
        "bounding box corresponding to each timestamp in the time period.",
    )
    # Frames 15 and 25 of 10 to 30; boxes from left, top, width and height to edges in pixels.
    assert isinstance(sample.truth, EventTruth)
    assert sample.truth.span == TimeSpan(0.25, 0.75)
    assert sample.truth.tube.boxes[20] == Box(20, 12, 36, 24)
    assert (sample.truth.tube.width, sample.truth.tube.height) == (64, 48)


def test_truth_is_about_the_frames_that_were_shown(tmp_path):
    media = Media("video", 64, 48, (0.4, 0.7, 1.0, 1.3), (10, 17, 23, 30))
    for task in ("svg", "stvg", "elc"):
        sample = read_one(tmp_path, task, [st_align_record(task)])
        truth, without = sample.truth_for(media), sample.truth_for(None)
        tube = truth if task == "svg" else truth.tube
        assert list(tube.seen()) == [17, 23]
        assert tube.tube().times == (1 / 3, 2 / 3)
        # Without media: one hundred frames, the published number.
        assert len((without if task == "svg" else without.tube).indices) == 100


def test_svg_gives_the_span_in_one_of_eight_wordings(tmp_path):
    sample = read_one(tmp_path, "svg", [st_align_record("svg")])
    wording, span, rest = sample.prompt
    assert wording.strip() in SPAN_WORDINGS
    assert span == TimeSpan(0.25, 0.75)
    assert rest.startswith(", where is the man?Please give the spatial bounding box")
    records = [st_align_record("svg") for _ in range(80)]
    file = write_json(tmp_path / "many.json", records)
    samples = read_dataset("svg", file).samples
    assert len(Counter(sample.prompt for sample in samples)) == 8
    # A record's wording depends on its place and the seed, not on what else is read.
    assert read_dataset("svg", file).samples == samples
    assert read_dataset("svg", write_json(tmp_path / "few.json", records[:9])).samples == samples[:9]
    assert read_dataset("svg", file, seed=1).samples != samples


def test_elc_gives_start_and_region(tmp_path):
    sample = read_one(tmp_path, "elc", [st_align_record("elc")])
    assert sample.prompt[:4] == (
        "Starts in ",
        Instant(0.25),
        ", what event is the subject in the region ",
        Box(0.234, 0.25, 0.484, 0.5),  # three digits: 15 / 64 is 0.234375
    )
    assert sample.truth.caption == "a man, in a hat, rides a bike"


def test_placeholders_may_stand_in_brackets(tmp_path):
    record = st_align_record("elc")
    record["conversations"] = ["Starts in <s>, what is in the region [<bbox>]?", record["conversations"][1]["value"]]
    assert [type(part).__name__ for part in read_one(tmp_path, "elc", [record]).prompt] == [
        "str",
        "Instant",
        "str",
        "Box",
        "str",
    ]


def test_names_may_lack_their_brackets(tmp_path):
    tokens = st_align_record("elc")["meta"]["spatial_token"]
    record = st_align_record("elc", spatial_token={"bbox": tokens["<bbox>"], "<bboxes>": tokens["<bboxes>"]})
    assert read_one(tmp_path, "elc", [record]) == read_one(tmp_path, "elc", [st_align_record("elc")])


def test_boxes_in_prompts_stay_in_the_picture_and_ends_in_the_clip(tmp_path):
    tokens = {**st_align_record("elc")["meta"]["spatial_token"], "<bbox>": [-4, 40, 80, 20]}
    record = st_align_record("elc", spatial_token=tokens, time_token={"<s>": 15, "<e>": 31})
    sample = read_one(tmp_path, "elc", [record])
    assert sample.prompt[3] == Box(0.0, 0.833, 1.0, 1.0)
    assert sample.truth.span == TimeSpan(0.25, 1.0)


def change(record, path, value):
    record = copy.deepcopy(record)
    *parents, last = path
    inner = record
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["video_path"], None, "video_path: expected this field"),
        (["video_path"], 3, "video_path: expected text, got 3"),
        (["meta", "width"], 0, "meta.width: expected a positive number, got 0"),
        (["meta", "height"], "48", "meta.height: expected a number, got '48'"),
        (["meta", "split"], [10], "meta.split: expected 2 numbers"),
        (["meta", "split"], [30, 10], "meta.split: expected the first and the last frame"),
        (["meta", "split"], [10, 29.5], "meta.split: expected the first and the last frame"),
        (["meta", "time_token"], None, "meta.time_token: expected this field"),
        (["meta", "time_token", "<e>"], None, "meta.time_token: expected <e>"),
        (["meta", "time_token", "<e>"], 40, "meta.time_token.<e>: expected a frame of the clip, 10 to 30, got 40"),
        (["meta", "time_token", "<e>"], 12, "expected <s> before <e>"),
        (["meta", "spatial_token", "<bboxes>"], None, "meta.spatial_token: expected <bboxes>"),
        (["meta", "spatial_token", "<bboxes>"], {"x": [0, 0, 1, 1]}, "expected frames for keys, got 'x'"),
        (["meta", "spatial_token", "<bboxes>"], {"99": [0, 0, 1, 1]}, "expected boxes in the clip"),
        (
            ["meta", "spatial_token", "<bboxes>", "15"],
            [0, 0, -1, 1],
            "<bboxes>.15: expected [left, top, width, height]",
        ),
        (
            ["meta", "spatial_token", "<bboxes>", "15"],
            [0, 0, float("nan"), 1],
            "<bboxes>.15: expected a number, got nan",
        ),
        (["meta", "spatial_token", "<bbox>"], [0, 0, 1], "meta.spatial_token.<bbox>: expected 4 numbers"),
        (["meta", "spatial_token", "<bbox>"], None, "bbox"),
        (["conversations"], [], "conversations: expected a question and an answer"),
        (["conversations", 1], {}, "conversations: expected texts"),
        (["conversations", 1], "a man rides", "conversations: expected the answer"),
    ],
)
def test_broken_records_are_listed_with_file_and_index(tmp_path, path, value, message):
    good = st_align_record("elc")
    file = write_json(tmp_path / "elc.json", [good, change(good, path, value), good])
    dataset = read_dataset("elc", file)
    assert [sample.index for sample in dataset.samples] == [0, 2]
    assert len(dataset.broken) == 1
    assert dataset.broken[0].startswith(f"{file}, record 1: ")
    assert message in dataset.broken[0]


def test_records_that_are_no_objects_are_broken(tmp_path):
    for task in ("stvg", "tvg"):
        dataset = read_dataset(task, write_json(tmp_path / "data.json", [None, 3, "x", [1]]))
        assert (len(dataset.samples), len(dataset.broken)) == (0, 4)


def test_charades_in_fractions(tmp_path):
    record = {"image_id": "AO8RW", "caption": "A person is Cooking.", "timestamp": [0.1, 0.5]}
    file = write_json(tmp_path / "data.json", [record])
    dataset = read_dataset("tvg", file)
    assert dataset.notes == ("timestamps are fractions of the video",)
    (sample,) = dataset.samples
    assert (sample.media, sample.clip, sample.truth) == ("AO8RW", None, TimeSpan(0.1, 0.5))
    assert sample.prompt[0].startswith("Give you a textual query: 'a person is cooking'. When does")
    media = Media("video", 64, 48, (0.0, 5.0, 10.0), (0, 5, 10))
    assert sample.truth_for(media) == TimeSpan(0.1, 0.5)


@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_charades_in_seconds(tmp_path, suffix):
    file = tmp_path / f"data.{suffix}"
    if suffix == "json":
        records = [("AO8RW", 0.0, 0.9), ("AO8RW", 2.5, 15.0)]
        write_json(file, [{"image_id": v, "caption": "cook", "timestamp": [s, e]} for v, s, e in records])
    else:
        file.write_text("AO8RW 0.0 0.9##cook\nAO8RW 2.5 15.0##cook\n\n")
    dataset = read_dataset("tvg", file)
    assert dataset.notes == ("timestamps are seconds",)
    # Frames come late at the end: half of the clip's frames are over after 2.5 of 10 seconds.
    media = Media("video", 64, 48, (0.0, 2.5, 10.0), (0, 5, 10))
    assert [sample.truth_for(media) for sample in dataset.samples] == [TimeSpan(0.0, 0.18), TimeSpan(0.5, 1.0)]
    assert dataset.samples[1].truth_for(None) == TimeSpan(2.5, 15.0)


def test_charades_unit_may_be_given(tmp_path):
    record = {"image_id": "AO8RW", "caption": "cook", "timestamp": [0.1, 0.5]}
    assert read_one(tmp_path, "tvg", [record], unit="seconds").in_seconds
    late = {**record, "timestamp": [0.1, 7]}
    dataset = read_dataset("tvg", write_json(tmp_path / "data.json", [late]), unit="fraction")
    assert "timestamp: expected 0 <= start <= end <= 1, got [0.1, 7]" in dataset.broken[0]


def test_charades_broken_records(tmp_path):
    lines = ["AO8RW 5.0 1.0##cook", "AO8RW x 1.0##cook", "AO8RW 0.0 1.0", "AO8RW 0.0 1.0##", "AO8RW 0.0 9.0##cook"]
    file = tmp_path / "data.txt"
    file.write_text("\n".join(lines))
    dataset = read_dataset("tvg", file)
    assert [sample.index for sample in dataset.samples] == [4]
    assert "record 0: timestamp: expected 0 <= start <= end, got [5.0, 1.0]" in dataset.broken[0]
    assert "record 1: expected VIDEO START END##CAPTION, got 'AO8RW x" in dataset.broken[1]
    assert "record 3: caption: expected text" in dataset.broken[3]


def test_refcoco(tmp_path):
    dataset = read_dataset("rec", write_json(tmp_path / "data.json", refcoco_content(60)))
    first = dataset.samples[0]
    assert (first.media, first.clip, first.truth) == ("0.png", None, Box(0.25, 0.25, 0.75, 0.75))
    assert len({sample.prompt[0].replace(f" {i}", "") for i, sample in enumerate(dataset.samples)}) == 4
    assert all(f"the dog {i}" in sample.prompt[0] for i, sample in enumerate(dataset.samples))


def test_refcoco_caption_may_be_a_whole_prompt(tmp_path):
    content = refcoco_content(1)
    content["images"][0]["caption"] = "<image>\nGive the box of the dog."
    assert read_one(tmp_path, "rec", content).prompt == ("Give the box of the dog.",)


def test_refcoco_broken(tmp_path):
    content = refcoco_content(4)
    content["annotations"][1]["image_id"] = 7
    content["images"][2]["width"] = 0
    content["annotations"][3]["bbox"] = None
    dataset = read_dataset("rec", write_json(tmp_path / "data.json", content))
    assert len(dataset.samples) == 1
    assert "record 1: image_id: expected the annotation of image 1, got that of 7" in dataset.broken[0]
    assert "record 2: width" in dataset.broken[1]
    assert "record 3: bbox: expected 4 numbers, got None" in dataset.broken[2]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("stvg", {"a": 1}, "expected a list of records, got dict"),
        ("tvg", "x", "expected a list of records, got str"),
        ("rec", [], "images: expected this field"),
        ("rec", {"images": [{}], "annotations": []}, "expected as many annotations as images"),
    ],
)
def test_other_files_are_refused(tmp_path, task, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_dataset(task, write_json(tmp_path / "data.json", content))
    assert "data.json" in str(error.value)


def test_files_that_are_not_json(tmp_path):
    (tmp_path / "data.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"data\.json: not JSON"):
        read_dataset("stvg", tmp_path / "data.json")
    with pytest.raises(ValueError, match="task: expected one of stvg, svg, elc, tvg, rec, got 'qa'"):
        read_dataset("qa", tmp_path / "data.json")


def test_media_may_lack_their_suffix(tmp_path):
    (tmp_path / "AO8RW.mkv").touch()
    sample = Sample(0, "AO8RW#0", "tvg", "AO8RW", ("?",), TimeSpan(0.0, 1.0))
    assert sample.file(tmp_path) == tmp_path / "AO8RW.mkv"
    assert sample.file(tmp_path / "empty") == tmp_path / "empty" / "AO8RW"
