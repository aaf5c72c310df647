"""What reads text, JSON and YAML of strangers: whatever comes, it is read or refused as documented, and does not take
more than linear time and memory."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llava_st.checkpoints.reading import CheckpointError, read_json
from llava_st.configuration_llava_st import TEMPLATE_TOKENS
from llava_st.coordinate_text import CoordinateText, from_text, read, write
from llava_st.data import files
from llava_st.data.records import find_problems, to_conversation
from llava_st.data.sources import read_sources
from llava_st.evaluation import records, st_align
from llava_st.evaluation.datasets import EVALUATED_TASKS, read_dataset
from llava_st.evaluation.predictions import PredictionFileError, read_predictions
from llava_st.geometry import Box
from llava_st.prompting.content import read_content
from llava_st.tasks import TASKS
from llava_st.tasks.base import AnswerError
from llava_st.training.checkpoints import damage
from llava_st.training.settings import read_settings

from tests.hardening.profiles import fuzz
from tests.model.annotations import st_align_record

# Of JSON that strangers write: integers that no float holds, numbers that are none, halves of characters.
ODD = (10**400, -(10**400), 10**299, 1e-320, "\0", "\ud800", "<s>", "<bboxes>", "../../etc/passwd", "\\q")
scalars = st.none() | st.booleans() | st.floats() | st.text(max_size=12) | st.integers() | st.sampled_from(ODD)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
# Pieces of what the patterns of coordinates look for.
TOKENS = (
    "<TEMP-INPUT>",
    "<WIDTH-OUTPUT>",
    "<HEIGHT-OUTPUT>",
    "<TEMP-OUTPUT0.5>",
    "<t",
    "<image>",
    "<video>",
    "<|im_end|>",
)
WORDS = ("Starts in ", "Ends in ", "Object bounding box:", "0.5", ".5", "1", "1e9", "\xe9", "\ud800", "\0")
PIECES = (*TOKENS, *WORDS, *"-:[]{}, \n><%")
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60)


def mutated(value, data):
    """The value with something of it replaced, or left out."""
    if not isinstance(value, (list, dict)) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(anything)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = data.draw(st.sampled_from(keys))
    changed = value.copy()
    if data.draw(st.integers(0, 7)) == 0:
        del changed[key]
    elif isinstance(value, dict) and data.draw(st.integers(0, 7)) == 0:
        changed[data.draw(st.sampled_from(("<wording>", "<self>", "<question>", "<\\q>", "")))] = changed.pop(key)
    else:
        changed[key] = mutated(changed[key], data)
    return changed


def dumped(value) -> bytes:
    return json.dumps(value).encode()


@fuzz(150)
@given(texts, st.data())
def test_any_answer_is_read_and_parsed_or_refused(text, data):
    count = sum(text.count(token) for token in TEMPLATE_TOKENS.values())
    numbers = data.draw(st.lists(st.floats(), min_size=count, max_size=count))
    parts, _ = read(CoordinateText(text, tuple(numbers)))
    write(parts, "output")
    for task in TASKS.values():
        with contextlib.suppress(AnswerError):
            task.parse(parts)


ITEMS = ("text", "image", "video", "instant", "span", "box", "tube")
KEYS = ("type", "text", "time", "start", "end", "box", "times", "boxes", "unit", "coordinates", "image", "video")
parts = st.dictionaries(st.sampled_from(KEYS), anything, max_size=5) | texts | anything


@fuzz(150)
@given(st.lists(parts, max_size=3) | anything, st.sampled_from(ITEMS), st.sampled_from(("input", "output")))
def test_any_content_of_a_message_is_read_or_refused(content, kind, side):
    def load(part):
        raise ValueError("no media here")

    if isinstance(content, list):
        content = [{**part, "type": kind} if isinstance(part, dict) else part for part in content]
    with contextlib.suppress(ValueError):
        read_content(content, side, load)


RECORD = {
    "id": "1", "video": "a.mp4", "type": "tvg",
    "conversations": [
        {"from": "human", "value": "<video>\nWhen?"}, {"from": "gpt", "value": " {<TEMP-OUTPUT><TEMP-OUTPUT>} "}
    ],
    "variables": {"temporal_output_locations": [0.25, 0.75]}, "meta": {"split": [30, 129]},
}  # fmt: skip


@fuzz(150)
@given(st.data())
def test_any_record_is_a_conversation_or_has_problems(data):
    record = mutated(RECORD, data)
    if problems := find_problems(record, "media"):
        assert all(str(problem) for problem in problems)
    else:
        to_conversation(record, "media")


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "a/../../b.mp4", ["a.mp4", "../b.mp4"]])
def test_media_outside_of_their_folder_are_a_problem(name):
    record = {**RECORD, "video": name}
    assert "video: expected files in the folder of media, media" in str(find_problems(record, "media")[0])
    assert find_problems({**RECORD, "video": "/media/a/../b.mp4"}, "/media") == []
    with pytest.raises(ValueError, match="folder of media"):
        to_conversation(record, "media")


FILES = {
    "tvg": [{"image_id": "AO8RW", "caption": "A person cooks.", "timestamp": [0.1, 0.5]}],
    "rec": {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48, "caption": "a dog"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 30, 40]}],
    },
    **{task: [st_align_record(task)] for task in ("stvg", "svg", "elc")},
}


@fuzz(150)
@given(st.sampled_from(EVALUATED_TASKS), st.data())
def test_any_file_of_a_benchmark_gives_samples_or_names_what_is_broken(tmp_path_factory, task, data):
    file = tmp_path_factory.getbasetemp() / "benchmark.json"
    file.write_bytes(dumped(mutated(FILES[task], data)))
    with contextlib.suppress(ValueError):
        dataset = read_dataset(task, file)
        assert len(dataset.samples) + len(dataset.broken) <= 4


@pytest.mark.parametrize("media", ["../a.mp4", "/etc/passwd"])
def test_a_sample_of_a_file_outside_of_the_folder_is_broken(tmp_path, media):
    (tmp_path / "a.json").write_bytes(dumped([{**FILES["tvg"][0], "image_id": media}]))
    dataset = read_dataset("tvg", tmp_path / "a.json")
    assert dataset.samples == ()
    assert "below the folder of media" in dataset.broken[0]


@pytest.mark.parametrize(
    ("field", "value"), [("time_token", {"<s>": 10**400, "<e>": 1}), ("split", [0, 10**400]), ("width", 10**400)]
)
def test_integers_that_no_float_holds_break_their_record_alone(tmp_path, field, value):
    record = st_align_record("svg")
    broken = {**record, "meta": {**record["meta"], field: value}}
    (tmp_path / "a.json").write_bytes(dumped([broken, record]))
    dataset = read_dataset("svg", tmp_path / "a.json")
    assert len(dataset.samples) == len(dataset.broken) == 1


@pytest.mark.parametrize("name", ["wording", "question", "self", "\\q"])
def test_names_of_items_may_be_anything(tmp_path, name):
    record = st_align_record("svg")
    turns = [
        {"from": "human", "value": f"{record['conversations'][0]['value']} [<{name}>]"},
        record["conversations"][1],
    ]
    tokens = {**record["meta"]["spatial_token"], f"<{name}>": [1, 2, 3, 4]}
    record = {**record, "conversations": turns, "meta": {**record["meta"], "spatial_token": tokens}}
    (tmp_path / "a.json").write_bytes(dumped([record]))
    dataset = read_dataset("svg", tmp_path / "a.json")
    if name == "\\q":
        assert any(isinstance(part, Box) for part in dataset.samples[0].prompt)
    else:
        assert "expected items of other names" in dataset.broken[0]


@pytest.mark.parametrize("noise", [". ", " ", "{", ", ", "Object bounding box:", "<e>"])
def test_captions_are_found_in_linear_time(noise):
    """In cubic time this would take hours."""
    assert st_align._caption(f"Ends in <e>, a dog{noise * 20_000} barks. Object bounding box: {{<bboxes>") is not None


def test_a_caption_is_what_it_was():
    for answer in (
        "<e>, a dog. barks . Object bounding box: {<bboxes>}",
        "in <E> a dog. barks",
        "<e>a dog. barks.{ <BBOXES>",
    ):
        assert st_align._caption(answer) == "a dog. barks"


DEEP = b"[" * 100_000


def test_brackets_without_end_are_refused_as_documented(tmp_path):
    file = tmp_path / "deep.json"
    for text in (DEEP, b'{"a": ' + b"9" * 5000 + b"}"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match="not JSON"):
            records.read_json(file)
        with pytest.raises(CheckpointError, match="is not JSON"):
            read_json(file)
    file.write_bytes(DEEP + b"\n")
    with pytest.raises(PredictionFileError, match="line 1: not a prediction"):
        read_predictions(file)
    (tmp_path / "manifest.json").write_bytes(DEEP)
    assert "not complete" in damage(tmp_path)
    for manifest in (b"[]", b'{"a": 1}', b'{"../../a": [1, 2, 3]}', b'{"a": "xy"}'):
        (tmp_path / "manifest.json").write_bytes(manifest)
        assert damage(tmp_path) is not None


YAML = (
    "!!bool x", "0x_", "!!int ''", "!!timestamp x", "2024-13-45", "[" * 100_000, "- " * 100_000, "? " * 3000, "&a [*a]",
    "!!python/object/apply:os.system [true]", "\x00", "x" * 2**21, "[" * 60, "{a: " * 60,
)  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_that_breaks_the_parser_is_a_value_error(tmp_path, text):
    file = tmp_path / "data.yaml"
    for key in ("datasets: ", "name: "):
        file.write_text(key + text)
        with pytest.raises(ValueError, match=r"data\.yaml: "):
            read_sources(file) if key[0] == "d" else read_settings(file)


def test_a_few_lines_of_yaml_do_not_fill_the_memory(tmp_path):
    """Aliases of aliases: 9 ** 30 values in an error's message."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    merged = ["a0: &a0 {b: c}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))]
    for text in ("\n".join(lines), "\n".join(merged)):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match="aliases are not read"):
            read_sources(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="braces may stand for at most"):
        read_sources("{a,b}" * 40)


@fuzz(100)
@given(st.text(st.sampled_from("abz09:-_&*!{}[],#|>%@`'\"? \n\t\\xéu<=~."), max_size=40))
def test_any_yaml_is_settings_or_a_value_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    for parse in (read_sources, read_settings):
        with pytest.raises((ValueError, FileNotFoundError)):
            parse(file)


LISTS = {
    "blanks": '[\n {"a":1},\n {"a"' + " " * 500_000 + 'x},\n {"a": 3}\n]',
    "broken": '[{"a": 1}' + ", x" * 30_000 + "]",
    "quotes": '[\n{"a": 1},' + '\n{x:"' * 30_000 + "1]",
    "open": '[{"a":1}' + ", [[[[" * 30_000 + "1]",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_broken_records_are_read_in_linear_time(tmp_path, name):
    """In quadratic time this would take hours."""
    (tmp_path / "a.json").write_text(LISTS[name])
    assert len(list(files.find_records(tmp_path / "a.json"))) >= 2


def test_a_long_string_in_a_broken_record_costs_its_own_length(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": tru, "b": "' + "x" * 2_000_000 + '"}, {"a": 3}]')
    tracemalloc.start()
    found = [each.text[:8] for each in files.find_records(tmp_path / "a.json")]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [b'{"a": 1}', b'{"a": tr', b'{"a": 3}']
    assert peak < 40_000_000  # a hundred bytes for each character would be 200


@fuzz(100)
@given(
    st.lists(
        st.sampled_from((b"[", b"]", b"{", b"}", b'"', b",", b":", b"1", b"a", b" ", b"\n", b"\\", b'{"a": 1}')),
        max_size=60,
    )
)
def test_any_bytes_are_records_or_no_list(tmp_path_factory, pieces):
    """Records do not overlap, and are where they are said to be."""
    file, text = tmp_path_factory.getbasetemp() / "any.json", b"".join(pieces)
    file.write_bytes(text)
    with contextlib.suppress(ValueError):
        end = 0
        for found in files.find_records(file):
            assert found.offset >= end
            assert text[found.offset : found.offset + len(found.text)] == found.text
            end = found.offset + len(found.text)


@fuzz(100)
@given(texts, st.integers(1, 4000))
def test_prompts_of_any_pieces_repeated_are_read_or_refused(text, times):
    with contextlib.suppress(ValueError):
        from_text((text * times)[:20_000], "input")
