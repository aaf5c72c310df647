"""The commands `check` and `convert`, and that memory does not grow with the number of records."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_st.coordinate_text import VARIABLES, CoordinateText, read
from llava_st.data.__main__ import main
from llava_st.data.check import Checked, _check, _in_processes, check
from llava_st.data.convert import AmbiguousError, convert_file, to_numbers, to_tokens
from llava_st.data.records import RecordError, turns_of
from llava_st.data.sources import Source, read_sources
from llava_st.data.table import Entry, RecordTable
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from PIL import Image

from benchmarks.record_memory import growth

from .clips import moving_square, write_video
from .training_records import make_record, write_records

SPAN, BOX = TimeSpan(0.25, 0.75), Box(0.1, 0.2, 0.3, 0.4)
CAPTION = {"variables": None, "type": "captioning"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", moving_square(12))


def run(capsys, *arguments) -> tuple[int, list[str]]:
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out.splitlines()


def test_check_reports_every_broken_record_with_file_and_line(tmp_path, capsys):
    lines = [
        make_record("<video>", ["It is", SPAN]),
        '{"id": 1',
        make_record("<video>", ["It is", SPAN], variables=None),
        "",
        make_record("Hi", "Hello", "And?"),
        make_record(**CAPTION),
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ]
    write_records(tmp_path / "a.jsonl", lines)
    listed = [make_record(**CAPTION), make_record("<video>", ["It is", TimeSpan(0.5, 0.25)], type=None), make_record()]
    (tmp_path / "b.json").write_text(json.dumps(listed, indent=1))
    (tmp_path / "train.yaml").write_text(
        "datasets:\n- {json_path: a.jsonl, data_folder: ., source: first}\n"
        "- {json_path: b.json, data_folder: ., source: second, sampling_strategy: 'first:1'}\n"
    )
    status, out = run(capsys, "check", tmp_path / "train.yaml", "--cache-dir", tmp_path / "cache")
    assert status == 1
    beginnings = [i for i, text in enumerate(json.dumps(listed, indent=1).splitlines(), start=1) if text == " {"]
    assert out[:-6] == [
        f"{tmp_path}/a.jsonl:2: not JSON: Expecting ',' delimiter, line 2, character 9 of the record",
        f"{tmp_path}/a.jsonl:3: positions: too few in variables.temporal_output_locations: 0 for 2 <TEMP-OUTPUT>",
        f"{tmp_path}/a.jsonl:5: order of turns: conversations: expected gpt to speak last, got human",
        f"{tmp_path}/a.jsonl:5: placeholders: expected as many <video> in the turns as videos, 1, got 0",
        f"{tmp_path}/a.jsonl:7: not JSON: Expecting value, line 7, character 1 of the record",
        f"{tmp_path}/b.json:{beginnings[1]} (record 1): start after end: conversations[1].value: a span ends before it "
        "starts: 0.500 to 0.250",
    ]
    assert [row.split() for row in out[-6:]] == [
        ["task", "records", "with", "coordinates", "broken"],
        ["captioning", "2", "0.0%", "0"],
        ["first", "2", "0.0%", "2"],
        ["second", "1", "100.0%", "1"],
        ["tvg", "4", "50.0%", "2"],
        ["all", "9", "33.3%", "5"],
    ]


def test_check_of_what_is_taken_alone(tmp_path, capsys):
    write_records(tmp_path / "a.json", [make_record(), make_record("Hi", "Hello")])
    (tmp_path / "train.yaml").write_text(
        "datasets: [{json_path: a.json, data_folder: ., sampling_strategy: 'first:1'}]"
    )
    arguments = ["check", tmp_path / "train.yaml", "--cache-dir", tmp_path / "cache"]
    assert run(capsys, *arguments)[0] == 1
    status, out = run(capsys, *arguments, "--selected")
    assert (status, out[-1].split()) == (0, ["all", "1", "0.0%", "0"])


def test_a_file_that_is_named_twice_is_checked_once(tmp_path, capsys):
    write_records(tmp_path / "a.json", [make_record(), make_record("Hi", "Hello"), make_record()])
    entry = "{{json_path: a.json, data_folder: ., sampling_strategy: '{}:1'}}"
    (tmp_path / "train.yaml").write_text(f"datasets: [{entry.format('first')}, {entry.format('end')}]")
    arguments = ["check", tmp_path / "train.yaml", "--cache-dir", tmp_path / "cache"]
    assert run(capsys, *arguments)[1][-1].split() == ["all", "3", "0.0%", "1"]
    assert run(capsys, *arguments, "--selected")[1][-1].split() == ["all", "2", "0.0%", "0"]


@pytest.mark.parametrize("text", ['{"a": 1}', '[{"id": 1}', ""])
def test_check_of_a_file_that_is_no_list(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    write_records(tmp_path / "b.json", [make_record()])
    status, out = run(capsys, "check", tmp_path / "{a,b}.json", "--cache-dir", tmp_path / "cache")
    assert status == 1
    assert out[0].startswith(f"{tmp_path}/a.json")
    assert "not JSON" in out[-5]
    assert out[-2].split() == ["tvg", "1", "0.0%", "0"]


def test_check_of_a_missing_file_says_so(tmp_path, capsys):
    assert main(["check", str(tmp_path / "a.yaml")]) == 1
    assert "a.yaml" in capsys.readouterr().err


def media_records(folder: Path, clip: Path) -> list:
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    return [
        make_record(),
        make_record(meta={"split": [2, 11]}),
        make_record(meta={"split": [2, 12]}),
        make_record(video="broken.mp4"),
        make_record(video="missing.mp4"),
        make_record("<image>", "Hi", video=None, image="a.png"),
        make_record("<image><image>", "Hi", video=None, image=["broken.png", "missing.png"]),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_check_of_media(tmp_path, clip, workers):
    sources = read_sources(write_records(tmp_path / "a.jsonl", media_records(tmp_path, clip)))
    found = list(check(sources, media_frames=4, workers=workers, cache_dir=tmp_path / "cache"))
    assert [[problem.kind for problem in each.problems] for each in found] == [
        [],
        [],
        ["media undecodable"],
        ["media undecodable"],
        ["media missing"],
        [],
        ["media undecodable", "media missing"],
    ]
    assert "expected 0 <= first <= last < 12 frames, got (2, 12)" in found[2].problems[0].message
    assert str(tmp_path / "missing.mp4") in found[4].problems[0].message
    assert [each.place for each in found] == [f"{tmp_path}/a.jsonl:{line}" for line in range(1, 8)]
    assert not any(each.problems for each in check(sources, cache_dir=tmp_path / "cache"))


def check_and_die(entry: Entry) -> Checked:
    if "die" in entry.text.decode():
        os.kill(os.getpid(), signal.SIGKILL)
    return _check(entry, None)


def test_a_process_that_dies_costs_its_record_alone(tmp_path):
    records = [make_record(), make_record(id="die"), make_record("Hi", "Hello"), make_record("Hi", "Hello", id="die")]
    table = RecordTable(read_sources(write_records(tmp_path / "a.json", records)), cache_dir=tmp_path / "cache")
    found = list(_in_processes(check_and_die, table, workers=2))
    assert [[problem.kind for problem in each.problems] for each in found] == [
        [],
        ["media undecodable"],
        ["placeholders"],
        ["placeholders", "media undecodable"],
    ]
    assert [each.place for each in found] == [f"{tmp_path}/a.json:1 (record {index})" for index in range(4)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["conversations", "variables", "meta", "video", "image", "type", "id", *VARIABLES.values()]
odd_turns = st.lists(
    st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt"]) | json_values, "value": json_values}),
    max_size=3,
)
odd_records = json_values | st.dictionaries(
    st.sampled_from(KEYS), json_values | odd_turns | st.fixed_dictionaries({"split": json_values}), max_size=5
)


@settings(max_examples=200, deadline=None)
@given(record=odd_records)
def test_no_record_stops_the_check(record):
    text = json.dumps(record).encode()
    _check(Entry(Source(Path("a.json"), Path("/nowhere")), 0, 1, "task", text, ""), media_frames=1)
    for convert in (to_tokens, to_numbers):
        with contextlib.suppress(RecordError, AmbiguousError):
            convert(json.loads(text))


# Conversion.

fractions = st.floats(0, 1)
places = st.tuples(fractions, fractions).map(sorted)
boxes = st.tuples(places, places).map(lambda edges: Box(edges[0][0], edges[1][0], edges[0][1], edges[1][1]))
spans = places.map(lambda ends: TimeSpan(*ends))
times = st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(lambda ks: [k / 99 for k in sorted(ks)])
tubes = times.flatmap(
    lambda moments: st.lists(boxes, min_size=len(moments), max_size=len(moments)).map(
        lambda rows: Tube(tuple(moments), tuple(rows))
    )
)
words = st.sampled_from(
    ["at", "Starts in ", ", then ", "0.5", "a [b] {c}", "1, 2, 3", "it's <b>", " from ", "[1, 2, 3, 4]"]
)
said = st.lists(words | boxes | spans | tubes | fractions.map(Instant), min_size=1, max_size=4)


def rounded(text: CoordinateText, decimals: int):
    return read(CoordinateText(text.text, tuple(round(x, decimals) for x in text.positions)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(asked=said, answered=said, decimals=st.sampled_from([3, 5]))
def test_numbers_come_back_as_the_same_coordinates(asked, answered, decimals):
    record = make_record(["<video>\nIs it ", *asked], ["yes ", *answered])
    try:
        numbers = to_numbers(record, decimals)
    except (RecordError, AmbiguousError):
        # Words happen to turn neighbours into other items, or edges meet by rounding: nothing is written then.
        return
    back = to_tokens(numbers)
    if not any(record["variables"].values()):
        assert numbers is record
        return
    assert "variables" not in numbers
    assert not any(token in turn["value"] for turn in numbers["conversations"] for token in VARIABLES)
    for (role, text), (back_role, back_text) in zip(turns_of(record), turns_of(back), strict=True):
        assert role == back_role
        assert rounded(text, decimals) == read(back_text)
    assert {**back, "conversations": 0, "variables": 0} == {**record, "conversations": 0, "variables": 0}


def test_numbers_of_the_layouts():
    record = make_record(
        ["<video>\nStarts in ", Instant(0.5912345), ", in", BOX],
        ["Ends in ", Instant(1.0), " or", SPAN, "or ", Tube((0.0,), (BOX,))],
    )
    numbers = to_numbers(record)
    assert [turn["value"] for turn in numbers["conversations"]] == [
        "<video>\nStarts in 0.591, in [0.100, 0.200, 0.300, 0.400]",
        "Ends in 1.000 or {0.250, 0.750} or 0.000:[0.100, 0.200, 0.300, 0.400]",
    ]
    back = to_tokens(numbers)
    assert back["conversations"] == record["conversations"]
    assert back["variables"] == {**record["variables"], "temporal_input_locations": [0.591]}
    assert to_tokens(back) is back


def test_a_point_in_time_among_words_keeps_its_token():
    numbers = to_numbers(make_record(["<video>\nWhat is at ", Instant(0.5), "?"], "A dog"))
    assert numbers["conversations"][0]["value"] == "<video>\nWhat is at <TEMP-INPUT0.5>?"


def test_words_that_look_like_coordinates_are_ambiguous():
    record = make_record("<video>\nIs it [0.1, 0.2, 0.3, 0.4]?", ["It is at", BOX])
    with pytest.raises(AmbiguousError, match="numbers would be read as other coordinates: .*Is it"):
        to_numbers(record)


def test_broken_numbers_are_reported():
    record = make_record("<video>\nIs it at [0.1, 0.2, 0.3, 1.4]?", "Yes", variables=None)
    with pytest.raises(RecordError, match=r"positions: .*fractions from 0 to 1, got 1\.4"):
        to_tokens(record)
    with pytest.raises(RecordError, match="start after end"):
        to_tokens(make_record("<video>\nIs it at {0.5, 0.25}?", "Yes", variables=None))


@pytest.mark.parametrize("names", ["a.json a.json", "a.jsonl b.json", "a.json b.jsonl"])
def test_convert_there_and_back(tmp_path, capsys, names):
    source, target = (tmp_path / name for name in names.split())
    records = [make_record(["<video>\nWhen is", BOX], [SPAN], id=f"é{i}", extra={"a": [None, 1.5]}) for i in range(3)]
    write_records(source, [*records, make_record(**CAPTION)])
    status, out = run(capsys, "convert", source, target, "--to", "numbers", "--decimals", "2")
    assert (status, out) == (0, [f"{target}: 4 converted, 0 ambiguous, 0 broken"])
    assert "[0.10, 0.20, 0.30, 0.40]" in target.read_text()
    assert "é0" in target.read_text()
    assert run(capsys, "convert", target, tmp_path / "c.jsonl", "--to", "tokens")[0] == 0
    back = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert back[:3] == records
    assert back[3]["conversations"] == make_record()["conversations"]
    assert not list(tmp_path.glob("*.part"))


def test_convert_copies_broken_records_and_reports_them(tmp_path, capsys):
    broken = make_record("Hi", "Hello", "\ud800", type="x")
    ambiguous = make_record("<video>[0.1, 0.2, 0.3, 0.4]", [SPAN])
    path = write_records(tmp_path / "a.jsonl", [broken, "{", make_record("<video>", [SPAN]), ambiguous])
    status, out = run(capsys, "convert", path, tmp_path / "b.json", "--to", "numbers")
    assert status == 1
    assert [line.split(": ")[0] for line in out[:-1]] == [f"{path}:{line}" for line in (1, 2, 4)]
    assert out[-1].endswith("1 converted, 1 ambiguous, 2 broken")
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result[0], result[2]) == (broken, ambiguous)
    assert result[1]["conversations"][1]["value"].strip() == "{0.250, 0.750}"


def test_an_interrupted_conversion_leaves_the_old_file(tmp_path):
    path = write_records(tmp_path / "a.json", [make_record()])
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match="expected a list of records"):
        convert_file(tmp_path / "b.json", path, "tokens")
    assert json.loads(path.read_text()) == [make_record()]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_memory_does_not_grow_with_the_records(tmp_path):
    """A million records may take 200 MB (benchmarks.record_memory reads as many); these take no more than their share,
    and of their text not a fifth."""
    count = 10_000
    found = growth(tmp_path, count)
    assert (found["records"], found["characters"] > 3_700 * count) == (count, True)
    assert found["grown_bytes"] < 5e6 + 200 * count
