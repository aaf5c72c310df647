"""Synthetic clips: what is asked is what is drawn, splits keep their promises, and files come back as meant."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from llava_st.coordinate_text import CoordinateText, from_variables, read, write
from llava_st.data.records import find_problems
from llava_st.data.sources import read_sources
from llava_st.evaluation.datasets import EVALUATED_TASKS, read_dataset
from llava_st.evaluation.metrics import TASK_METRICS, box_iou, stvg_metrics, temporal_iou
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.synthesis import (
    SYNTHETIC_TASKS,
    benchmarks,
    constant_answer,
    event_truth,
    make_records,
    make_scene,
    st_align_record,
    synthesize,
    writing,
)
from llava_st.synthesis.questions import describe, still_frame
from llava_st.synthesis.rendering import RGB, render, render_frame
from llava_st.synthesis.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, TRAINING_PAIRS
from llava_st.tasks import TASKS, Event, SpatioTemporal
from llava_st.video import load_image, load_video, read_frames
from PIL import Image

HARD = ("validation", "held-out")
SCENES = {split: [make_scene(7, split, clip) for clip in range(300)] for split in ("train", *HARD)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("held-out")
    synthesize(out, clips=6, seed=3, split="held-out", questions_per_clip=100)
    return out


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _texts(record: dict) -> list[CoordinateText]:
    return from_variables([turn["value"] for turn in record["conversations"]], record["variables"])


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_pair_is_trained_or_held_out_and_held_out_words_are_known():
    assert len(set(TRAINING_PAIRS) | set(HELD_OUT_PAIRS)) == len(SHAPES) * len(COLOURS)
    assert not set(TRAINING_PAIRS) & set(HELD_OUT_PAIRS)
    assert {shape for shape, _ in TRAINING_PAIRS} == set(SHAPES)
    assert {colour for _, colour in TRAINING_PAIRS} == set(COLOURS)
    for shape, colour in HELD_OUT_PAIRS:
        # Seen in most colours, and each held-out pair with another of its colour and one of its shape.
        assert sum(other == shape for other, _ in TRAINING_PAIRS) == 8
        assert sum(other == shape for other, _ in HELD_OUT_PAIRS) == sum(c == colour for _, c in HELD_OUT_PAIRS) == 2


@pytest.mark.parametrize(
    ("split", "pairs"), [("train", TRAINING_PAIRS), ("validation", TRAINING_PAIRS), ("held-out", HELD_OUT_PAIRS)]
)
def test_splits_keep_to_their_pairs_in_objects_and_in_words(split, pairs):
    scenes = SCENES[split][:200]
    for scene in scenes:
        assert {(shape.shape, shape.colour) for shape in scene.objects} <= set(pairs)
    said = json.dumps([make_records(scene, questions=100) for scene in scenes])
    every = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    assert {pair for pair in every if f"{pair[1]} {pair[0]}" in said} == set(pairs)


@pytest.mark.parametrize("split", HARD)
def test_hard_splits_have_three_objects_and_share_the_asked_colour_or_shape(split):
    for scene in SCENES[split]:
        asked, others = scene.objects[scene.asked], [o for i, o in enumerate(scene.objects) if i != scene.asked]
        assert len(scene.objects) in (3, 4)
        assert any(other.colour == asked.colour for other in others)
        assert any(other.shape == asked.shape for other in others)
        assert len({shape.name for shape in scene.objects}) == len(scene.objects)
        assert scene.other != scene.asked
        other = scene.objects[scene.other]
        assert other.colour == asked.colour or other.shape == asked.shape


@pytest.mark.parametrize("split", SCENES)
def test_sides_spans_and_paths_stay_within_limits(split):
    lengths = []
    for scene, index in ((each, i) for each in SCENES[split] for i in range(len(each.objects))):
        span, shape = scene.span(index), scene.objects[index]
        lengths.append(span.end - span.start)
        for box in scene.tube(index).boxes:
            assert 0 <= box.left < box.right <= 1
            assert 0 <= box.top < box.bottom <= 1
        assert 0.15 <= shape.width <= 0.40
        assert 0.15 <= shape.height <= 0.40
        first, last = shape.box(shape.first), shape.box(shape.last)
        moved = {
            "left": first.left - last.left,
            "right": last.left - first.left,
            "up": first.top - last.top,
            "down": last.top - first.top,
        }
        assert max(moved, key=moved.get) == shape.direction
    assert min(lengths) >= 0.10
    assert max(lengths) <= 0.60
    # Of 19 steps 2 to 11 are possible, each as likely.
    counts = np.bincount(np.rint(np.array(lengths) * 19).astype(int), minlength=12)[2:]
    assert len(counts) == 10
    assert counts.min() > 0.6 * counts.mean()


@pytest.mark.parametrize("split", HARD)
def test_no_constant_answer_is_good(split):
    truths = [event_truth(scene, scene.asked) for scene in SCENES[split]]
    best = constant_answer(truths)
    assert best.m_tiou < 0.40
    assert best.m_siou < 0.25
    # The metrics agree, and other answers are not better.
    times = tuple(i / 19 for i in range(20))
    scores = stvg_metrics([(SpatioTemporal(best.span, Tube(times, (best.box,) * 20)), truth) for truth in truths])
    assert scores["m_tIoU"] == pytest.approx(100 * best.m_tiou)
    assert scores["m_sIoU"] == pytest.approx(100 * best.m_siou)
    rng = random.Random(0)
    for _ in range(100):
        span = TimeSpan(*sorted(rng.random() for _ in range(2)))
        (left, right), (top, bottom) = (sorted(rng.random() for _ in range(2)) for _ in range(2))
        box = Box(left, top, right, bottom)
        assert np.mean([temporal_iou(span, truth.span) for truth in truths]) <= best.m_tiou
        means = [np.mean([box_iou(box, each) for each in truth.tube.tube().boxes]) for truth in truths[:50]]
        assert np.mean(means) < best.m_siou + 0.05


def test_the_search_finds_the_one_right_answer_where_there_is_one():
    scene = SCENES["train"][0]
    still = replace(scene.objects[0], path=((0.31, 0.47),) * 3)
    truth = event_truth(replace(scene, objects=(still,), asked=0), 0)
    best = constant_answer([truth])
    assert best.m_tiou > 0.98
    assert best.m_siou > 0.96


def test_boxes_are_what_is_drawn():
    size = 96
    for shape, scene in zip(SHAPES * 4, SCENES["train"], strict=False):
        alone = replace(scene.objects[0], shape=shape)
        empty = render_frame(replace(scene, objects=()), 0, size).astype(int)
        pictures = render(replace(scene, objects=(alone,)), size)
        for frame, picture in enumerate(pictures):
            changed = abs(picture - empty).max(axis=2) > 0
            assert changed.any() == alone.visible(frame)
            if changed.any():
                rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
                box = alone.box(frame)
                drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                expected = size * np.array([box.left, box.top, box.right, box.bottom])
                # Pixels that the shape meets: never beyond those of its box; a tip may colour the last one too little.
                outside = np.array([np.floor(expected[:2]) - drawn[:2], drawn[2:] - np.ceil(expected[2:])])
                assert outside.max() <= 0
                assert outside.min() >= -1


def test_decoded_colours_are_told_apart(tmp_path):
    palette = np.array([RGB[colour] for colour in COLOURS])
    synthesize(tmp_path, clips=8, seed=11, objects=(1, 1), tasks=("qa",))
    for clip in range(8):
        scene = make_scene(11, "train", clip, objects=(1, 1))
        shape = scene.objects[0]
        decoded = read_frames(tmp_path / f"videos/train-{clip:06d}.mp4", range(20))
        for frame in range(shape.first, shape.last + 1):
            inside = (render_frame(scene, frame) == RGB[shape.colour]).all(axis=2)
            seen = decoded[frame][inside].mean(axis=0)
            assert COLOURS[abs(palette - seen).sum(axis=1).argmin()] == shape.colour


def test_the_same_arguments_make_the_same_files_and_other_seeds_do_not(folder, tmp_path):
    synthesize(tmp_path / "a", clips=6, seed=3, split="held-out", questions_per_clip=100)
    assert _files(tmp_path / "a") == _files(folder)
    assert make_scene(3, "held-out", 0) != make_scene(4, "held-out", 0) != make_scene(4, "held-out", 1)
    decoded = read_frames(folder / "videos/held-out-000002.mp4", range(20))
    assert abs(np.stack(decoded).astype(int) - render(make_scene(3, "held-out", 2))).mean() < 4


def test_a_run_goes_on_where_it_was_cut_off(folder, tmp_path, monkeypatch):
    written = []

    def fill_the_disk(path, frames):
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")
        written.append(path)
        original(path, frames)

    original = writing.write_video
    monkeypatch.setattr(writing, "write_video", fill_the_disk)
    arguments = {"seed": 3, "split": "held-out", "questions_per_clip": 100}
    with pytest.raises(OSError, match="no space"):
        synthesize(tmp_path, clips=3, **arguments)
    assert len(list((tmp_path / "videos").iterdir())) == 2
    assert not (tmp_path / "held-out.yaml").exists()
    monkeypatch.setattr(writing, "write_video", original)
    kept = (tmp_path / "videos/held-out-000000.mp4").stat().st_mtime_ns
    synthesize(tmp_path, clips=6, **arguments)
    assert _files(tmp_path) == _files(folder)
    assert (tmp_path / "videos/held-out-000000.mp4").stat().st_mtime_ns == kept


def test_clips_of_two_data_sets_do_not_share_a_folder_but_questions_share_clips(tmp_path):
    first = synthesize(tmp_path, clips=1, tasks=("tvg",), name="stage2")
    with pytest.raises(ValueError, match="out: .* holds other clips"):
        synthesize(tmp_path, clips=1, seed=1)
    second = synthesize(tmp_path, clips=1, tasks=("svg",), longest_tube=1, name="stage3")
    assert [source.file.name for path in (first, second) for source in read_sources(path)] == [
        "stage2.jsonl",
        "stage3.jsonl",
    ]
    assert {record["type"] for record in _records(tmp_path / "stage2.jsonl")} == {"tvg"}
    for record in _records(tmp_path / "stage3.jsonl"):
        assert [len(TASKS["svg"].parse(read(text).parts).times) for text in _texts(record)[1::2]] == [1] * (
            len(record["conversations"]) // 2
        )


def _load(part: dict) -> object:
    if part["type"] == "image":
        return load_image(part["image"], 28)
    return load_video(part["video"], 20, 28, part["clip"])


def test_records_are_sound_and_complete(folder):
    (source,) = read_sources(folder / "held-out.yaml")
    records = _records(source.file)
    assert {record["type"] for record in records} == set(SYNTHETIC_TASKS)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert find_problems(record, source.folder, _load) == []
        for text in _texts(record)[1::2]:
            parts, problems = read(text)
            assert problems == []
            TASKS[record["type"]].parse(parts)


def test_answers_are_the_truth_exactly():
    for scene in SCENES["train"][:40]:
        records = make_records(scene, ("stvg", "svg", "elc", "tvg", "rec"), questions=100)
        for record in records:
            texts = _texts(record)
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                value = TASKS[record["type"]].parse(read(answer).parts)
                if record["type"] == "elc":
                    index = next(i for i, o in enumerate(scene.objects) if f" {o.name} moves" in value.caption)
                    assert value == Event(Instant(scene.span(index).end), value.caption, scene.tube(index))
                    start, box = (item for item in read(question).parts if not isinstance(item, str))
                    assert (start.time, box) == (
                        scene.span(index).start,
                        scene.objects[index].box(scene.objects[index].first),
                    )
                    continue
                index = next(i for i, shape in enumerate(scene.objects) if shape.name in question.text)
                truth = {
                    "stvg": SpatioTemporal(scene.span(index), scene.tube(index)),
                    "svg": scene.tube(index),
                    "tvg": scene.span(index),
                }
                if record["type"] == "rec":
                    assert value == scene.objects[index].box(still_frame(scene))
                else:
                    assert value == truth[record["type"]]


def test_articles_suit_the_colour():
    shape = SCENES["train"][0].objects[0]
    for colour in COLOURS:
        said = describe(replace(shape, colour=colour)).split(f"{colour} ")[0]
        assert said == ("an " if colour == "orange" else "a ")


def test_short_answers_are_right():
    asked = set()
    for scene in SCENES["train"]:
        for record in make_records(scene, ("qa",), questions=100):
            texts = [text.text.removeprefix("<video>\n") for text in _texts(record)]
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                words = question.rstrip("?").split()
                asked.add(" ".join(words[:2]))
                by_name = {shape.name: shape for shape in scene.objects}
                if question.startswith("What colour"):
                    assert [o.colour for o in scene.objects if o.shape == words[-1]] == [answer]
                elif question.startswith("What shape"):
                    assert [o.shape for o in scene.objects if o.colour == words[-2]] == [answer]
                elif question.startswith("In which direction"):
                    assert by_name[" ".join(words[-3:-1])].direction == answer
                elif question.startswith("Is there"):
                    assert (" ".join(words[3:5]) in by_name) == (answer == "yes")
                elif question.startswith("Which appears"):
                    names = [name.removeprefix("the ") for name in question[:-1].split(", ")[1].split(" or ")]
                    assert answer == f"the {min(names, key=lambda name: by_name[name].first)}"
                else:
                    kind = words[2]
                    matching = [o for o in scene.objects if kind in (o.colour, "objects") or kind.startswith(o.shape)]
                    assert answer == str(len(matching))
    assert len(asked) == 6


def test_conversations_have_as_many_questions_as_are_asked_for():
    for scene in SCENES["held-out"][:20]:
        for questions, turns in ((8, 4), (3, 1), (5, 2)):
            records = make_records(scene, None, questions, turns)
            lengths = [len(record["conversations"]) // 2 for record in records]
            assert sum(lengths) == questions
            assert max(lengths) <= turns
            assert all(record["conversations"][0]["value"].startswith(("<video>\n", "<image>\n")) for record in records)


@pytest.mark.parametrize("task", EVALUATED_TASKS)
def test_right_answers_to_the_benchmarks_score_everything(folder, task):
    dataset = read_dataset(task, folder / "benchmark" / f"{task}.json")
    assert dataset.broken == ()
    assert len(dataset.samples) == 6
    pairs = []
    for clip, sample in enumerate(dataset.samples):
        scene = make_scene(3, "held-out", clip)
        index, span, tube = scene.asked, scene.span(scene.asked), scene.tube(scene.asked)
        shape = scene.objects[index]
        caption = describe(shape)
        value = {
            "stvg": SpatioTemporal(span, tube),
            "svg": tube,
            "elc": Event(Instant(span.end), caption, tube),
            "tvg": span,
            "rec": shape.box(still_frame(scene)),
        }[task]
        parts, problems = read(write(TASKS[task].answer(value), "output"))
        assert problems == []
        file = sample.file(folder)
        _, media = load_image(file, 28) if task == "rec" else load_video(file, 20, 28, sample.clip)
        truth = sample.truth_for(media)
        pairs.append((TASKS[task].parse(parts), truth))
        if task == "elc":
            assert truth.caption == caption
    scores = TASK_METRICS[task](pairs)
    assert all(value == pytest.approx(100) for name, value in scores.items() if "IoU" in name or "@" in name)


def test_questions_of_benchmarks_are_those_of_training(folder):
    """Up to the phrase before a span and the digits of positions, which the reader of benchmarks rounds."""
    for task in EVALUATED_TASKS:
        asked = {
            write(sample.prompt, "input").text
            for seed in range(30)
            for sample in read_dataset(task, folder / "benchmark" / f"{task}.json", seed).samples
        }
        trained = {
            text.text.partition("\n")[2] or text.text
            for record in _records(folder / "held-out.jsonl")
            if record["type"] == task
            for text in _texts(record)[::2]
        }
        assert asked & trained


def test_benchmarks_ask_about_another_object_on_demand(folder):
    scenes = [make_scene(3, "held-out", clip) for clip in range(6)]
    others = benchmarks(scenes, 96, asked=lambda scene: scene.other)
    for scene, record in zip(scenes, others["stvg"], strict=True):
        assert record == st_align_record(scene, scene.other, "stvg", 96)
        assert scene.objects[scene.other].name in record["conversations"][0]["value"]


def test_images_are_frames_with_the_asked_object(folder):
    for clip in range(6):
        scene = make_scene(3, "held-out", clip)
        frame = still_frame(scene)
        assert scene.objects[scene.asked].visible(frame)
        with Image.open(folder / f"images/held-out-{clip:06d}.png") as image:
            assert (np.asarray(image) == render_frame(scene, frame)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": 0}, "clips"),
        ({"tasks": ("dvc",)}, "tasks: expected some of"),
        ({"tasks": ()}, "tasks: .*none"),
        ({"size": 33}, "size: expected an even number"),
        ({"split": "test"}, "split: expected one of"),
        ({"objects": (1, 2), "split": "held-out"}, "objects: expected 3 <="),
        ({"frames": 2}, "frames: expected 3"),
        ({"longest_tube": 0}, "longest_tube: expected 1"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "out", **{"clips": 1, **changes})
    assert not (tmp_path / "out").exists()


def test_no_object_is_hidden():
    for scene in chain(*SCENES.values()):
        for i, shape in enumerate(scene.objects):
            for frame in (shape.first, (shape.first + shape.last) // 2, shape.last):
                box = shape.box(frame)
                above = [o.box(frame) for o in scene.objects[i + 1 :] if o.visible(frame)]
                assert all(box_iou(box, other) < 0.6 for other in above)
