"""Records in files: found where they are, whatever is broken between them."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_st.data import files
from llava_st.data.files import find_records, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(), values, max_size=4) | st.integers(), max_size=6)
LAYOUTS = [
    {},
    {"indent": 2},
    {"separators": (",", ":")},
    {"ensure_ascii": False},
    {"indent": 0, "ensure_ascii": False},
]


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def readings(path):
    """Lines, and what is there: a value, or why there is none."""
    found = []
    for each in find_records(path):
        try:
            value = parse(each.text, each.line)
        except ValueError as error:
            value = f"broken: {error}"
        found.append((each.line, each.problem or value))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=records, layout=st.sampled_from(LAYOUTS), chunk=st.sampled_from([1, 7, 64, 2**20]), bom=st.booleans())
def test_a_list_is_read_as_json_reads_it(tmp_path, monkeypatch, data, layout, chunk, bom):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    text = (b"\xef\xbb\xbf" if bom else b"") + json.dumps(data, **layout).encode("utf-8", "surrogatepass")
    path = written(tmp_path / "a.json", text)
    found = list(find_records(path))
    assert [each.problem for each in found] == [""] * len(data)
    for each, expected in zip(found, data, strict=True):
        assert text[each.offset : each.offset + len(each.text)] == each.text
        assert each.line == text[: each.offset].count(b"\n") + 1
        assert json.loads(each.text.decode("utf-8", "surrogatepass")) == expected


def test_lines(tmp_path):
    path = written(tmp_path / "a.jsonl", '\n{"id": 1}\r\n  \n{"id": \n{"id": "é"}')
    assert readings(path) == [
        (2, {"id": 1}),
        (4, "broken: Expecting value, line 4, character 7 of the record"),
        (5, {"id": "é"}),
    ]
    found = list(find_records(path))
    assert [path.read_bytes()[each.offset :][: len(each.text)] for each in found] == [each.text for each in found]


BROKEN = {
    "comma missing": '{"id": 1 "x": 2}',
    "quote missing": '{"id": "1, "x": 2}',
    "brace missing": '{"id": 1, "x": [{"id": 3}]',
    "bracket missing": '{"id": 1, "x": [1, 2}',
    "cut off": '{"id": 1, "x": "some te',
    "comma too many": '{"id": 1, "x": 2,}',
    "no JSON": "nothing",
    "single quotes": "{'id': 1}",
    "number": '{"id": 01}',
    "not UTF-8": b'{"id": "\xff"}',
    "too deep": '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "too long a number": '{"id": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("layout", ["compact", "lines", "indented"])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_record_costs_no_other(tmp_path, what, place, layout):
    good = [{"id": i, "x": [{"id": 5}, {"y": '],{"id": }'}]} for i in range(3)]
    indent = 2 if layout == "indented" else None
    texts = [json.dumps(record, indent=indent).encode() for record in good]
    broken = BROKEN[what] if isinstance(BROKEN[what], bytes) else BROKEN[what].encode()
    texts.insert(place, broken)
    if layout == "indented":
        texts = [b"  " + text.replace(b"\n", b"\n  ") for text in texts]
    before, between, after = (b"[", b", ", b"]") if layout == "compact" else (b"[\n", b",\n", b"\n]\n")
    found = readings(written(tmp_path / "a.json", before + between.join(texts) + after))
    assert [value for _, value in found if not isinstance(value, str)] == good
    assert len(found) == 4
    line, reason = found[place]
    assert reason.startswith("broken: ")
    assert line == (before + between.join([*texts[:place], b""])).count(b"\n") + 1


def test_a_record_over_the_end_of_a_chunk_is_not_broken(tmp_path, monkeypatch):
    draw = random.Random(0)
    data = [{"id": i, "turns": [{"id": 0}, {"id": 1}], "text": "é" * draw.randrange(300)} for i in range(300)]
    data[7]["text"] = "é" * 10_000
    for chunk in (100, 4096, 5000):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        found = readings(written(tmp_path / "a.json", json.dumps(data)))
        assert [value for _, value in found] == data


def test_a_broken_record_does_not_tell_how_others_begin(tmp_path):
    found = readings(written(tmp_path / "a.json", '[{"id": 1}, {"x": [[{}, {"id": 2}, {"id": 3}]'))
    assert [value for _, value in found if not isinstance(value, str)] == [{"id": 1}, {"id": 2}, {"id": 3}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"id": 1}, {"id": 2}', "the list of records does not end: the file was cut off"),
        ('[{"id": 1}, {"id": 2},]', "expected a record behind the last comma"),
        ('[{"id": 1},, {"id": 2}]', "expected a record before the comma"),
        ('[{"id": 1} {"id": 2}]', "expected a comma before this record"),
        ('[{"id": 1}, {"id": 2}] [', "expected nothing behind the list of records"),
    ],
)
def test_a_damaged_list_is_a_problem_of_its_own(tmp_path, text, problem):
    found = list(find_records(written(tmp_path / "a.json", text)))
    assert [each.problem for each in found if each.problem] == [problem]
    ids = [parse(each.text)["id"] for each in found if each.text.startswith(b"{")]
    assert ids == [1, 2]


@pytest.mark.parametrize(("text", "got"), [("", "'nothing'"), ('{"id": 1}', "'{'"), ("x", "'x'")])
def test_a_file_that_is_no_list_is_refused(tmp_path, text, got):
    with pytest.raises(ValueError, match=rf"a\.json: expected a list of records.* got {got}"):
        list(find_records(written(tmp_path / "a.json", text)))


def test_memory_is_bounded_where_nothing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_RECORD", 2**12)
    monkeypatch.setattr(files, "_CHUNK", 2**10)
    endless = '[{"id": 1}, {"id": "' + "x" * 2**16
    found = readings(written(tmp_path / "a.json", endless))
    assert found[0] == (1, {"id": 1})
    assert found[1][1].endswith("the list cannot be read from here")
    assert len(found) == 2
    lines = written(tmp_path / "a.jsonl", '{"id": 1}\n' + "x" * 2**16 + '\n{"id": 2}')
    assert readings(lines) == [(1, {"id": 1}), (2, "a line of 4096 bytes or more"), (3, {"id": 2})]
    assert lines.read_bytes()[list(find_records(lines))[2].offset :] == b'{"id": 2}'
