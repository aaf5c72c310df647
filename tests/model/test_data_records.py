"""Records of the published format: where they come from, what is wrong with them, the conversations that they are."""

from __future__ import annotations

import json
import re
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from llava_st.coordinate_text import CoordinateText, read, write
from llava_st.data.order import EpochSampler, shuffled
from llava_st.data.records import PROBLEMS, RecordError, find_problems, to_conversation
from llava_st.data.sources import Source, Strategy, read_sources
from llava_st.data.table import RecordTable
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.tasks import TASKS, CaptionedSpan, Event, GroundedText, SpatioTemporal

from .training_records import make_record, write_records

BOX = Box(0.1, 0.2, 0.3, 0.4)
SPAN = TimeSpan(0.25, 0.75)
TUBE = Tube((0.25, 0.5), (BOX, Box(0.2, 0.3, 0.4, 0.5)))
ASKED = make_record(["<video>\nWhat is in", BOX, " during", SPAN, "?"], ["It starts", SPAN, "and is at ", TUBE])

# Of each task, fields of the prompt and an answer.
EXAMPLES = {
    "stvg": ({"question": "Where is the dog?"}, SpatioTemporal(SPAN, TUBE)),
    "svg": ({"question": "From <s> to <e>, where is it? ", "s": Instant(0.1), "e": Instant(0.9)}, TUBE),
    "elc": ({"s": Instant(0.25), "box": BOX}, Event(Instant(0.5), "a dog barks", TUBE)),
    "tvg": ({"event": "a dog barks"}, SPAN),
    "tr": ({"span": SPAN}, "a dog barks"),
    "rec": ({"event": "the dog"}, BOX),
    "reg": ({"box": BOX}, "a dog"),
    "dgc": ({}, GroundedText(("A dog", BOX, "barks"))),
    "dvc": ({}, (CaptionedSpan(SPAN, "a dog barks"), CaptionedSpan(SPAN, "it leaves"))),
    "captioning": ({}, "A dog barks."),
    "qa": ({"question": "What barks?"}, "A dog"),
    "temporal_grounded_conversation": ({"message": "When?"}, GroundedText(("It is", SPAN, "there"))),
    "image_grounded_conversation": ({"message": "Where?"}, GroundedText(("It is", BOX, "there"))),
    "conversation": ({"message": "Hello"}, "Hello"),
    "classification": ({}, "barking"),
}


def without(record, *path):
    """The record without the value at a path."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def changed(record, value, *path):
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def turn(role, value="<video>"):
    return {"from": role, "value": value}


VARIABLES = "variables"
T_IN, T_OUT = "temporal_input_locations", "temporal_output_locations"
BROKEN = {
    "wrong type: expected a record": [1, 2],
    "missing key: conversations": without(ASKED, "conversations"),
    "missing key: conversations[1].value": without(ASKED, "conversations", 1, "value"),
    "missing key: conversations[0].from": without(ASKED, "conversations", 0, "from"),
    "wrong type: conversations: expected a list": changed(ASKED, "hello", "conversations"),
    "wrong type: conversations[0]: expected from": changed(ASKED, "hello", "conversations", 0),
    "wrong type: conversations[0].value: expected text": changed(ASKED, 3, "conversations", 0, "value"),
    "wrong type: conversations[1].value: expected an answer": make_record("<video>", " "),
    "wrong type: conversations[1].value: expected text, got '\\ud800'": make_record("<video>", "\ud800"),
    "unknown role: conversations[1].from: expected human or gpt, got 'user'": changed(
        ASKED, "user", "conversations", 1, "from"
    ),
    "unknown role: conversations[0].from: expected human or gpt, got ['human']": changed(
        ASKED, ["human"], "conversations", 0, "from"
    ),
    "order of turns: conversations[0].from: expected human": make_record(conversations=[turn("gpt", "hello")]),
    "order of turns: conversations[1].from: expected gpt": make_record(conversations=[turn("human"), turn("human")]),
    "order of turns: conversations: expected gpt to speak last": make_record(conversations=[turn("human")]),
    "placeholders: expected as many <video> in the turns as videos, 1, got 0": make_record("Hi", "Hello"),
    "placeholders: expected as many <video> in the turns as videos, 0, got 1": make_record(video=None),
    "placeholders: expected as many <image> in the turns as images, 2, got 1": make_record(
        "<image>", "Hi", video=None, image=["a.png", "b.png"]
    ),
    "placeholders: conversations[1].value: gpt shows no video": make_record("Hi", "<video>"),
    f"positions: too few in variables.{T_IN}: 1 for 2 <TEMP-INPUT>": changed(ASKED, [0.5], VARIABLES, T_IN),
    f"positions: too few in variables.{T_OUT}: 0 for 4": without(ASKED, VARIABLES, T_OUT),
    "positions: too few in variables.spatial_width_input_locations": without(ASKED, VARIABLES),
    f"positions: too many in variables.{T_IN}: 3 for 2": changed(ASKED, [0.1, 0.2, 0.3], VARIABLES, T_IN),
    "positions: variables: unknown list 'times'": changed(ASKED, [0.5], VARIABLES, "times"),
    "positions: conversations[0].value: <TEMP-INPUT0.5> has its number": make_record("<video><TEMP-INPUT0.5>", "Yes"),
    "positions: conversations[1].value: expected OUTPUT tokens": make_record(
        "<video>", [CoordinateText("<TEMP-INPUT>", (0.5,))]
    ),
    f"range: variables.{T_IN}[1]: expected 0 to 1, got 1.5": changed(ASKED, [0.5, 1.5], VARIABLES, T_IN),
    f"range: variables.{T_IN}[0]: expected 0 to 1, got -0.1": changed(ASKED, [-0.1, 0.5], VARIABLES, T_IN),
    f"wrong type: variables.{T_IN}[0]: expected a number, got nan": changed(ASKED, [float("nan"), 1], VARIABLES, T_IN),
    f"wrong type: variables.{T_IN}[1]: expected a number, got True": changed(ASKED, [0, True], VARIABLES, T_IN),
    f"wrong type: variables.{T_IN}: expected a list": changed(ASKED, {"0": 0.5}, VARIABLES, T_IN),
    "wrong type: variables: expected lists": changed(ASKED, [0.5], VARIABLES),
    "start after end: conversations[1].value: a span ends": make_record("<video>", [TimeSpan(0.5, 0.25)]),
    "start after end: conversations[1].value: a box ends left": make_record("<video>", [Box(0.5, 0, 0.25, 1)]),
    "start after end: conversations[1].value: a box ends above": make_record("<video>", [Box(0, 0.5, 1, 0.25)]),
    "start after end: conversations[1].value: times of a tube": make_record("<video>", [Tube((0.5, 0.25), (BOX, BOX))]),
    "start after end: meta.split: [9, 3]": make_record(meta={"split": [9, 3]}),
    "range: meta.split: expected frames from 0": make_record(meta={"split": [-1, 3]}),
    "wrong type: meta.split: expected the first and the last frame": make_record(meta={"split": [0, 3.5]}),
    "wrong type: meta: expected an object": make_record(meta=[0, 3]),
    "wrong type: video: expected a file": make_record(video=3),
    "wrong type: image: expected a file": make_record(image=["a.png", ""]),
    "wrong type: video: expected names of files": make_record(video="a\0b"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_is_wrong_with_a_record(problem):
    found = [str(each) for each in find_problems(BROKEN[problem])]
    assert [each for each in found if each.startswith(problem)], found
    with pytest.raises(RecordError, match=re.escape(problem)):
        to_conversation(BROKEN[problem])


def test_the_kinds_of_problems_are_the_documented_ones():
    found = {problem.kind for record in BROKEN.values() for problem in find_problems(record)}
    assert found | {"not JSON", "media missing", "media undecodable"} == set(PROBLEMS)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = page[page.index("| kind |") :].split("\n\n")[0].splitlines()[2:]
    assert tuple(row.split("|")[1].strip() for row in rows) == PROBLEMS


def test_several_things_wrong_are_all_told():
    record = changed(ASKED, [0.5, 1.5], VARIABLES, T_IN) | {"meta": {"split": [3, 1]}, "image": 3}
    assert {problem.kind for problem in find_problems(record)} == {"range", "start after end", "wrong type"}


@pytest.mark.parametrize(
    "record",
    [
        ASKED,
        make_record("Hi", "Hello", "And you?", "Fine", video=None, variables=None, type=None, id=None),
        make_record("<video>", "Yes", variables={}, meta=None),
        make_record("<video>", "Yes", meta={"split": [0, 0.0], "more": {"deep": [1, {"a": None}]}}, extra=[1, "x"]),
        make_record(["<video>", TimeSpan(0, 1)], [Box(0, 0, 0, 0), Instant(1)]),
        make_record("<image> or <image>?", "The first", video=None, image=["a.png", "b.png"]),
        make_record("<image>\nWhat?", "A dog", "Is it in <video>?", "Yes", image="a.png"),
    ],
)
def test_nothing_is_wrong_with(record):
    assert find_problems(record) == []
    to_conversation(record)


def test_a_conversation_has_positions_by_occurrence():
    first, second = [SPAN, "and", TimeSpan(0.0, 0.125)], [TimeSpan(0.5, 1.0), " now"]
    record = make_record(["<video>\nDuring", *first], ["yes", SPAN], second, ["at ", Instant(0.625)])
    assert record["variables"][T_IN] == [0.25, 0.75, 0.0, 0.125, 0.5, 1.0]
    assert record["variables"][T_OUT] == [0.25, 0.75, 0.625]
    conversation = to_conversation({**record, "meta": {"split": [3, 90.0]}}, "/data")
    assert [message["role"] for message in conversation] == ["user", "assistant"] * 2
    assert conversation[0]["content"][0] == {"type": "video", "video": "/data/clip.mp4", "clip": (3, 90)}
    texts = [message["content"][-1] for message in conversation]
    assert texts[0] == write(["<video>\nDuring", *first], "input")
    assert texts[1:] == [
        write(["yes", SPAN], "output"),
        write(second, "input"),
        write(["at ", Instant(0.625)], "output"),
    ]


def test_media_are_where_their_placeholders_are():
    images = make_record(
        "<image> or <image>?", "No", "And <image>?", "No", video=None, image=["a.png", "b.png", "/data/c.png"]
    )
    first, _, third, _ = to_conversation(images, "/data")
    assert [part.get("image") for part in first["content"][:-1]] == ["/data/a.png", "/data/b.png"]
    assert [part.get("image") for part in third["content"][:-1]] == ["/data/c.png"]


@pytest.mark.parametrize("task", TASKS)
def test_records_of_every_task(tmp_path, task):
    """Written as published, read from a file, and back to the value that the answer gives."""
    fields, value = EXAMPLES[task]
    medium = TASKS[task].media
    prompt = [f"<{medium}>\n", *TASKS[task].prompt(**fields)]
    media = {"video": None, medium: f"x.{medium}"}
    record = make_record(prompt, TASKS[task].answer(value), type=task, **media)
    table = RecordTable(read_sources(write_records(tmp_path / "a.jsonl", [record])), cache_dir=tmp_path / "cache")
    assert table[0].record() == record
    assert table[0].task == task
    asked, answered = to_conversation(table[0].record(), "/data")
    assert asked["content"] == [{"type": medium, medium: f"/data/x.{medium}"}, write(prompt, "input")]
    assert TASKS[task].parse(read(answered["content"][0]).parts) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("first:25%", range(3)),
        ("end:25%", range(7, 10)),
        ("first:0", range(0)),
        ("end:0", range(10, 10)),
        ("end:99", range(10)),
        ("first:0.1%", range(1)),
        ("end:100%", range(10)),
    ],
)
def test_strategies(text, expected):
    assert list(Strategy(text).choose(10)) == list(expected)


def test_shares_are_exact():
    for size in (7, 100, 1009):
        for percent in (1, 7, 29, 58, 99):
            assert len(Strategy(f"first:{percent}%").choose(size)) == ceil(size * percent / 100 - 1e-9)


@pytest.mark.parametrize("text", ["some", "first", "first:", "first:-1", "first:1.5", "end:x", "random:5 %", "ALL"])
def test_unknown_strategies_are_refused(text):
    with pytest.raises(ValueError, match="sampling_strategy: expected all, first:N"):
        Strategy(text)


def test_random_records_depend_on_seed_file_and_place_alone():
    chosen = Strategy("random:30").choose(100, 7, "a.json")
    assert len(set(chosen.tolist())) == 30
    assert chosen.tolist() == sorted(chosen.tolist())
    np.testing.assert_array_equal(chosen, Strategy("random:30%").choose(100, 7, "a.json"))
    assert chosen.tolist() != Strategy("random:30").choose(100, 8, "a.json").tolist()
    assert chosen.tolist() != Strategy("random:30").choose(100, 7, "b.json").tolist()
    assert set(Strategy("random:10").choose(100, 7, "a.json").tolist()) <= set(chosen.tolist())


def test_files_are_sampled_independently(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_records(tmp_path / name, [make_record(id=i) for i in range(50)])
    entries = ", ".join(
        f"{{json_path: {name}.jsonl, data_folder: ., sampling_strategy: 'random:40%'}}" for name in ("a", "b")
    )
    (tmp_path / "train.yaml").write_text(f"datasets: [{entries}]")
    sources = read_sources(tmp_path / "train.yaml")

    def chosen(seed):
        return [entry.record()["id"] for entry in RecordTable(sources, seed, tmp_path / "cache")]

    assert len(chosen(0)) == 40
    assert chosen(0)[:20] != chosen(0)[20:]
    assert chosen(0) == chosen(0) != chosen(1)


def test_the_shuffled_order_is_the_same_on_every_machine():
    assert shuffled(8, 0, 0).tolist() == [1, 4, 3, 0, 2, 6, 5, 7]


def test_shuffling_favours_no_place():
    counts = np.zeros((5, 5))
    for key in range(4000):
        counts[np.arange(5), shuffled(5, key)] += 1
    assert abs(counts / 4000 - 0.2).max() < 0.03


def test_sampler_goes_through_all_and_can_start_anywhere():
    sampler = EpochSampler(100, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    sampler.start_at(40)
    assert len(sampler) == 60
    assert list(sampler) == first[40:]
    assert list(sampler) == first
    assert list(EpochSampler(5, shuffle=False)) == [0, 1, 2, 3, 4]
    assert list(EpochSampler(100, seed=2)) != first
    with pytest.raises(ValueError, match="sample: expected 0 to 100, got 101"):
        sampler.start_at(101)
    filled = EpochSampler(5, seed=1, multiple=4)
    assert list(filled) == [*EpochSampler(5, seed=1), None, None, None]
    filled.start_at(4)
    assert (len(filled), len(list(filled)), len(filled)) == (4, 4, 8)


YAML = """
datasets:
  - json_path: lists/{a,b}.json
    data_folder: media
    source: stvg
    sampling_strategy: first:1
  - json_path: lists/c.jsonl
    data_folder: .
"""


def test_yaml_names_files_folders_and_strategies(tmp_path):
    for name in ("a.json", "b.json", "c.jsonl"):
        write_records(tmp_path / "lists" / name, [make_record(id=f"{name}{i}", type=None) for i in range(3)])
    (tmp_path / "media").mkdir()
    (tmp_path / "train.yaml").write_text(YAML)
    sources = read_sources(tmp_path / "train.yaml")
    assert sources[0] == Source(tmp_path / "lists" / "a.json", tmp_path / "media", Strategy("first:1"), "stvg")
    table = RecordTable(sources, cache_dir=tmp_path / "cache")
    assert [entry.record()["id"] for entry in table] == ["a.json0", "b.json0", "c.jsonl0", "c.jsonl1", "c.jsonl2"]
    assert [table[i] for i in range(len(table))] == list(table)
    assert table.tasks() == {"stvg": 2, "c": 3}
    assert [entry.place.rsplit("/")[-1] for entry in table] == ["a.json:1 (record 0)", "b.json:1 (record 0)"] + [
        f"c.jsonl:{i}" for i in (1, 2, 3)
    ]
    assert len(RecordTable(sources, cache_dir=tmp_path / "cache", everything=True)) == 9


def test_names_in_yaml_may_be_relative_to_where_the_program_runs(tmp_path, monkeypatch):
    write_records(tmp_path / "lists" / "c.jsonl", [make_record()])
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "train.yml").write_text("datasets: [{json_path: lists/c.jsonl, data_folder: lists}]")
    with pytest.raises(FileNotFoundError, match=r"train.yml, dataset 1: .*lists.* or lists: not there"):
        read_sources(tmp_path / "yaml" / "train.yml")
    monkeypatch.chdir(tmp_path)
    assert len(read_sources("yaml/train.yml")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: {", "not YAML"),
        ("data: 3", "expected `datasets:` and a list"),
        ("datasets: []", "expected `datasets:` and a list"),
        ("datasets: [3]", "dataset 1: expected json_path"),
        ("datasets: [{json_path: a.json}]", "dataset 1: data_folder: expected a path, got None"),
        ("datasets: [{json_path: a.json, data_folder: ., sampling_strategy: some}]", "dataset 1: sampling_strategy"),
        (
            "datasets: [{json_path: a.json, data_folder: ., sampling_strategie: all}]",
            "dataset 1: sampling_strategie: there",
        ),
    ],
)
def test_malformed_yaml_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sources(tmp_path / "train.yaml")


def test_one_file_and_braces_without_yaml(tmp_path):
    for name in ("a1.json", "a2.json"):
        write_records(tmp_path / name, [make_record()])
    assert read_sources(tmp_path / "a1.json") == [Source(tmp_path / "a1.json", tmp_path, name="a1")]
    both = read_sources(tmp_path / "a{1,2}.json", folder="/media")
    assert [(source.file.name, str(source.folder)) for source in both] == [("a1.json", "/media"), ("a2.json", "/media")]
    with pytest.raises(FileNotFoundError, match=r"a3\.json"):
        read_sources(tmp_path / "a{1,3}.json")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [make_record(id="old")])
    table = RecordTable(read_sources(path), cache_dir=tmp_path / "cache")
    write_records(path, [make_record(id="new"), make_record()])
    with pytest.raises(RuntimeError, match=r"a\.jsonl: has changed while it was in use"):
        table[0]
    again = RecordTable(read_sources(path), cache_dir=tmp_path / "cache")
    assert [entry.record()["id"] for entry in again] == ["new", "a"]


def test_indices_beyond_the_end_are_errors(tmp_path):
    table = RecordTable(read_sources(write_records(tmp_path / "a.json", [make_record()])), cache_dir=tmp_path / "cache")
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"index: expected 0 to 0, got {index}"):
            table[index]
