"""Items as text with template tokens, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_st.coordinate_text import (
    CoordinateText,
    from_text,
    from_variables,
    literal,
    plain,
    read,
    spell_out,
    to_variables,
    write,
)
from llava_st.geometry import Box, Instant, TimeSpan, Tube

BOX = Box(0.1, 0.2, 0.3, 0.4)
CORNERS = "[<WIDTH-{0}><HEIGHT-{0}><WIDTH-{0}><HEIGHT-{0}>]"
IN, OUT = CORNERS.format("INPUT"), CORNERS.format("OUTPUT")
TI, TO = "<TEMP-INPUT>", "<TEMP-OUTPUT>"

fractions = st.floats(0, 1)
boxes = st.builds(Box, fractions, fractions, fractions, fractions)
tubes = st.lists(st.tuples(fractions, boxes), min_size=1, max_size=4).map(lambda rows: Tube(*zip(*rows, strict=True)))
single_items = st.one_of(st.builds(Instant, fractions), st.builds(TimeSpan, fractions, fractions), boxes)
items = single_items | tubes
# Without spaces at the ends, which belong to the layout of boxes and spans, and without brackets and colons.
words = st.text(st.sampled_from("ab .,!?-'0123\n<>é"), min_size=1, max_size=8).filter(
    lambda text: text == text.strip(" ")
)


@st.composite
def mixed_parts(draw):
    """Texts and items; no two texts, and no two tubes with separators alone between them, which would be one."""
    parts = []
    for part in draw(st.lists(words | items, max_size=8)):
        last = [each for each in parts[-2:] if not isinstance(each, str) or each.strip(" ,\n")][-1:]
        joins = isinstance(part, Tube) and any(isinstance(each, Tube) for each in last)
        if not joins and not (isinstance(part, str) and parts and isinstance(parts[-1], str)):
            parts.append(part)
    return parts


def broken_parts():
    """Texts that are nearly layouts."""
    fragments = [TO, TI, OUT, "<WIDTH-OUTPUT>", "<HEIGHT-INPUT>", *"[]{}:,; \nx<", f"{TO}:{OUT}", f"{{{TO}{TO}}}"]
    return st.lists(st.sampled_from(fragments), max_size=30).map("".join)


def with_positions(text, first=0.25):
    count = sum(text.count(token) for token in ("INPUT>", "OUTPUT>"))
    return CoordinateText(text, tuple(first + i / 1000 for i in range(count)))


@pytest.mark.parametrize(
    ("parts", "text", "positions"),
    [
        (["Where is", BOX, "?"], f"Where is {IN}?", (0.1, 0.2, 0.3, 0.4)),
        (["During", TimeSpan(0.1, 0.5), "who"], f"During {{{TI}{TI}}} who", (0.1, 0.5)),
        (["Starts in ", Instant(0.591), "."], f"Starts in {TI}.", (0.591,)),
        (
            ["Object bounding box: ", Tube((0.0, 0.5), (BOX, Box(0.5, 0.6, 0.7, 0.8)))],
            f"Object bounding box: {TI}:{IN}, {TI}:{IN}",
            (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.6, 0.7, 0.8),
        ),
        ([], "", ()),
        ([BOX], f" {IN}", (0.1, 0.2, 0.3, 0.4)),
        ([Tube((), ())], "", ()),
        # One space beside boxes and spans, whatever the texts have there.
        (["a  ", BOX, BOX], f"a {IN} {IN}", (0.1, 0.2, 0.3, 0.4) * 2),
        (["a ", TimeSpan(0, 1), " ", BOX, " b"], f"a {{{TI}{TI}}} {IN} b", (0, 1, 0.1, 0.2, 0.3, 0.4)),
        ([TimeSpan(0, 1), "", "  b"], f" {{{TI}{TI}}} b", (0, 1)),
        ([from_text("{0.0, 1.0}", "input"), CoordinateText(" b")], f" {{{TI}{TI}}} b", (0, 1)),
        (["a\n", BOX], f"a\n {IN}", (0.1, 0.2, 0.3, 0.4)),
        ([CoordinateText(f"at {TI} ", (0.3,)), BOX], f"at {TI} {IN}", (0.3, 0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_layouts(parts, text, positions):
    assert write(parts, "input") == CoordinateText(text, positions)
    assert write(parts, "output").text.replace("OUTPUT", "INPUT") == text


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="side: expected 'input' or 'output', got 'inputs'"):
        write([], "inputs")
    with pytest.raises(ValueError, match="one position for each of its 1 coordinate tokens, got 0"):
        write([f"at {TI}"], "input")


@given(mixed_parts(), st.sampled_from(["input", "output"]))
@settings(deadline=None)
def test_reading_inverts_writing(parts, side):
    written = write(parts, side)
    assert read(written).parts == parts
    assert from_text(spell_out(written), side) == written


@given(st.lists(st.text(st.sampled_from("ab .\n"), max_size=4) | single_items, max_size=8))
@settings(deadline=None)
def test_writing_inverts_reading_of_what_was_written(parts):
    written = write(parts, "output")
    assert write(read(written).parts, "output") == written


@given(broken_parts())
@settings(max_examples=300, deadline=None)
def test_every_position_comes_back_from_any_text(text):
    """As an item's, or written out in the text, which is a problem then."""
    given_text = with_positions(text)
    parts, problems = read(given_text)
    found = plain(write(parts, "output"))
    numbers = [f"{position:.3f}" for position in given_text.positions]
    assert all(number in found for number in numbers)
    if not any(isinstance(part, str) and number in part for part in parts for number in numbers):
        return
    assert problems


@given(st.text(max_size=40))
@settings(deadline=None)
def test_text_without_coordinates_stays(text):
    alone = literal(text)
    assert read(alone) == ([alone.text] if text else [], [])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (OUT, [BOX]),
        ("[<WIDTH-OUTPUT>,<HEIGHT-OUTPUT>, <WIDTH-OUTPUT> ; <HEIGHT-OUTPUT> ]", [BOX]),
        (f"{{ {TO}, {TO} }}.", [TimeSpan(0.1, 0.2), "."]),
        (f"from {TO} to {TO}, {TO}", ["from ", Instant(0.1), " to ", Instant(0.2), ", ", Instant(0.3)]),
        (f"at {TO}: [sic]", ["at ", Instant(0.1), ": [sic]"]),
        (f"at {TO}, {TO}:{OUT}", ["at ", Instant(0.1), ", ", Tube((0.2,), (Box(0.3, 0.4, 0.5, 0.6),))]),
        (f"{{{TO}:{OUT}}}", [Tube((0.1,), (Box(0.2, 0.3, 0.4, 0.5),))]),
        (f"x { {'a': 1} } {OUT}", ["x {'a': 1}", BOX]),
    ],
)
def test_variants_are_read(text, parts):
    count = sum(text.count(side) for side in ("INPUT>", "OUTPUT>"))
    assert read(CoordinateText(text, tuple((i + 1) / 10 for i in range(count)))) == (parts, [])


def test_a_tube_is_read_with_and_without_spaces_and_braces():
    values = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.2, 0.3, 0.4, 0.5)
    tube = Tube((0.1, 0.6), (Box(0.2, 0.3, 0.4, 0.5), Box(0.2, 0.3, 0.4, 0.5)))
    for text in (f"{TO}:{OUT}, {TO}:{OUT}", f"{{{TO}:{OUT},{TO}:{OUT}}}", f"{{ {TO} : {OUT} {TO}: {OUT} }}"):
        assert read(CoordinateText(text, values)) == ([tube], [])


@pytest.mark.parametrize(
    ("text", "parts", "problem"),
    [
        ("see [<WIDTH-OUTPUT><HEIGHT-OUTPUT>", ["see [0.250, 0.251"], "between brackets"),
        ("<WIDTH-OUTPUT>]", ["0.250]"], "between brackets"),
        (OUT[:-1] + "<WIDTH-OUTPUT>]", ["[0.250, 0.251, 0.252, 0.253, 0.254]"], "between brackets"),
        (OUT.replace("WIDTH", "x").replace("HEIGHT", "WIDTH").replace("x", "HEIGHT"), None, "between brackets"),
        ("<HEIGHT-OUTPUT>", ["0.250"], "outside of a box"),
        (f"{{{TO}", ["{0.250"], "between braces"),
        (f"{{{TO}{TO}", ["{0.250, 0.251"], "between braces"),
        (f"{TO}}}", ["0.250}"], "between braces"),
        (f"{{{TO}}}", ["{0.250}"], "between braces"),
        (f"{TO}:[", ["0.250:["], "without its box"),
        (f"{TO}:[<WIDTH-OUTPUT>", ["0.250:[0.251"], "without its box"),
        (f"{{{TO}:{OUT}", None, "unbalanced brace"),
        (f"{{{TO}:{OUT}, {TO}:[<WIDTH-OUTPUT>", None, "without its box"),
    ],
)
def test_what_is_malformed_is_a_problem(text, parts, problem):
    reading = read(with_positions(text))
    assert any(problem in each for each in reading.problems), reading
    if parts is not None:
        assert reading.parts == parts


def test_complete_boxes_of_a_tube_that_was_cut_off_are_kept():
    values = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    parts, problems = read(CoordinateText(f"Object: {TO}:{OUT}, {TO}:[<WIDTH-OUTPUT>", values))
    assert parts == ["Object: ", Tube((0.1,), (Box(0.2, 0.3, 0.4, 0.5),)), ", 0.600:[0.700"]
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (TimeSpan(0.5, 0.25), "ends before it starts: 0.500 to 0.250"),
        (Box(0.5, 0.1, 0.25, 0.2), "ends left of where it starts: 0.500, 0.100, 0.250, 0.200"),
        (Box(0.1, 0.5, 0.2, 0.25), "ends above where it starts"),
        (Tube((0.5, 0.25), (BOX, BOX)), "do not ascend: 0.500, 0.250"),
        (Tube((0.5, 0.5), (BOX, BOX)), "do not ascend"),
        (Tube((0.5,), (Box(0.5, 0.1, 0.25, 0.2),)), "ends left"),
    ],
)
def test_contradictions_are_problems_and_kept(item, problem):
    parts, problems = read(write([item], "output"))
    assert parts == [item]
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize("item", [TimeSpan(0.5, 0.5), Box(0.5, 0.5, 0.5, 0.5), Tube((0.1, 0.2), (BOX, BOX))])
def test_what_is_empty_is_no_problem(item):
    assert read(write([item], "output")) == ([item], [])


@pytest.mark.parametrize(
    "unit",
    [" ", "{", "[", f"{{{TO}", f"{TO} ", f"[{' ' * 50}", "<HEIGHT-OUTPUT>", f"{TO}: [", f"{TO}:{OUT[:-1]}", "<TEMP-"],
)
def test_long_texts_are_read_in_linear_time(unit):
    """In quadratic time this would take hours."""
    text = unit * (200_000 // len(unit))
    parts, _ = read(with_positions(text, first=0.0))
    assert parts


@pytest.mark.parametrize(
    "unit", [" ", "1", "1.", "1 ", "0.5,", "0.5 ", "[0.5", "0.5:[", f"0.5{' ' * 50}", "[ ", "<t", "Ends in 0"]
)
def test_long_prompts_are_searched_in_linear_time(unit):
    text = unit * (200_000 // len(unit))
    try:
        assert from_text(text, "input").text == text
    except ValueError as error:
        assert "unbalanced" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "expected", "positions"),
    [
        ("Where is [0.1, 0.2, 0.3, 0.4]?", f"Where is {IN}?", (0.1, 0.2, 0.3, 0.4)),
        ("at [.1 .2 .3 1.0]", f"at {IN}", (0.1, 0.2, 0.3, 1.0)),
        ("at [0,0,0.5,1]", f"at {IN}", (0, 0, 0.5, 1)),
        ("in {0.123456789012, 0.5}", f"in {{{TI}{TI}}} ", (0.123456789012, 0.5)),
        ("Starts in 0.591, region[0.1,0.2,0.3,0.4]", f"Starts in {TI}, region {IN}", (0.591, 0.1, 0.2, 0.3, 0.4)),
        ("Ends in 0.8.", f"Ends in {TI}.", (0.8,)),
        ("From <t0.1> to <TEMP-INPUT0.591>", f"From {TI} to {TI}", (0.1, 0.591)),
        ("{<t0.1>,<t0.2>}", f" {{{TI}{TI}}} ", (0.1, 0.2)),
        ("[<w0.1>,<h0.2>,<w0.3>,<h0.4>]", f" {IN}", (0.1, 0.2, 0.3, 0.4)),
        ("[<w0.1><h0.2><w0.3><h0.4>]", f" {IN}", (0.1, 0.2, 0.3, 0.4)),
        ("near <w0.3>,<h0>", "near <WIDTH-INPUT>,<HEIGHT-INPUT>", (0.3, 0)),
        ("0.1:[0.2,0.3,0.4,0.5], <t1>:[<w0>,<h0>,<w1>,<h1.0>]", f"{TI}:{IN}, {TI}:{IN}", None),
        ("{0.1:[0.2,0.3,0.4,0.5], 0.2:[0.2,0.3,0.4,0.5]}", f"{TI}:{IN}, {TI}:{IN}", None),
        ("seen 0.1, 0.2:[0.2,0.3,0.4,0.5]", f"seen 0.1, {TI}:{IN}", (0.2, 0.2, 0.3, 0.4, 0.5)),
        ("Question 12: [0.2,0.3,0.4,0.5]", f"Question 12: {IN}", (0.2, 0.3, 0.4, 0.5)),
    ],
)
def test_published_forms(text, expected, positions):
    written = from_text(text, "input")
    assert written.text == expected
    if positions is not None:
        assert written.positions == positions
    assert from_text(text, "output").text == expected.replace("INPUT", "OUTPUT")


def test_the_side_is_what_it_is_called_with():
    assert from_text("<TEMP-OUTPUT0.5>", "input") == CoordinateText(TI, (0.5,))
    assert from_text("<TEMP-INPUT0.5>", "output") == CoordinateText(TO, (0.5,))


@pytest.mark.parametrize(
    "text",
    [
        "[see above] and [1, 2, 3] or [1, 2, 3, 4], [0, 0, 1, 1], {0, 1}",
        "x[0.5], [0.1, 0.2], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5], {0.5}, {0.1, 0.2, 0.3}",
        "[scores: 0.1, 0.2, 0.3, 0.4] and [0.1, 0.2, 0.3, 0.4 are scores]",
        "in [0.0, 1.0) of 1.5, 2.5, 3.5, 4.5",
        "for (i = 0; i < 5; i++) { a[i] = {0.5f, 1.5f}; }",
        "<h1>Title</h1> <t> <b>",
        "Ends in 0.5 seconds, Starts in 12.5, ends in 0.5s or in 0.5%",
        "version 0.1.2.3, 1.2:3",
        "{'a': 0.5, 'b': 1.5}",
        "<im_start> <vid_patch> <|im_end|> <TEMP-012> <image>",
        "",
    ],
)
def test_ordinary_text_stays(text):
    assert from_text(text, "input") == CoordinateText(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("left of [0.1, 0.2, 0.3, 0.4", "left of [0.1, 0.2, 0.3, 0.4"),
        ("0.1, 0.2, 0.3, 0.4] here", "0.1, 0.2, 0.3, 0.4] here"),
        ("[0.1, 0.2, 0.3", "[0.1, 0.2, 0.3"),
        ("in {0.1, 0.5 who", "{0.1, 0.5 who"),
        ("0.1, 0.5}", "0.1, 0.5}"),
        ("[0.1, 0.2, 0.3, 0.4 in [this]", "0.4 in [this]"),
        ("[this] 0.1, 0.2, 0.3, 0.4]", "0.3, 0.4]"),
        ("[0.1, 0.2, 0.3, 0.4}", "0.4}"),
        ("{0.1, 0.5]", "{0.1, 0.5]"),
        ("[<w0.1>,<h0.2>,<w0.3>,<h0.4>", "[<w0.1>"),
        ("[<w0.1>,<h0.2>]", "[<w0.1>"),
        ("[<h0.1>,<w0.2>,<h0.3>,<w0.4>]", "[<h0.1>"),
        ("<w0.1>,<h0.2>]", "<h0.2>]"),
        ("{<t0.1>", "{<t0.1>"),
        ("{<t0.1>,<t0.2>,<t0.3>}", "<t0.3>}"),
        ("<t0.1>:[<w0.1>,<h0.2>]", "<t0.1>:["),
    ],
)
def test_unbalanced_coordinates_are_refused(text, place):
    with pytest.raises(ValueError, match="unbalanced|expected|without its box") as caught:
        from_text(text, "input")
    assert place in str(caught.value)


@pytest.mark.parametrize(
    "form",
    ["<w1.5>", "<t-0.1>", "<t5>", "<TEMP-INPUT1.01>", "[0.1, 0.2, 0.3, 40]", "{3.5, 7.25}", "5.5:[0.1,0.2,0.3,0.4]"],
)
def test_coordinates_that_are_no_fractions_are_refused(form):
    with pytest.raises(ValueError, match="fractions from 0 to 1, got") as caught:
        from_text(f"look at {form} now", "input")
    assert f"look at {form} now" in str(caught.value)


@pytest.mark.parametrize("form", ["<TEMP-INPUT>", "<WIDTH-OUTPUT>", "<HEIGHT-INPUTx>", "<t0.1.2>", "<w.>"])
def test_coordinate_tokens_without_a_number_are_refused(form):
    with pytest.raises(ValueError, match="without a number") as caught:
        from_text(f"at {form}", "input")
    assert form in str(caught.value)


@given(st.text(st.sampled_from("01.,[]{}<>:twh -TEMPINUS\n"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_prompt_is_read_or_refused(text):
    try:
        written = from_text(text, "input")
    except ValueError:
        return
    assert all(0 <= position <= 1 for position in written.positions)
    assert written.text.count("<TEMP-INPUT>") + written.text.count("<WIDTH") + written.text.count("<HEIGHT") == len(
        written.positions
    )


def test_plain_numbers():
    text = write(["a", BOX, TimeSpan(0, 1), Tube((0.5,), (BOX,))], "output")
    assert plain(text) == "a [0.100, 0.200, 0.300, 0.400] {0.000, 1.000} 0.500:[0.100, 0.200, 0.300, 0.400]"
    assert plain(text, decimals=1).startswith("a [0.1, 0.2, 0.3, 0.4]")


def test_literal_words_have_no_template_tokens():
    assert literal("a <TEMP-INPUT> <t0.5> b").text == "a <TEMP INPUT> <t0.5> b"


def test_lists_of_variables():
    turns = [
        write(["Where at ", Instant(0.5), BOX], "input"),
        write([TimeSpan(0.6, 0.7), Box(0.01, 0.02, 0.03, 0.04)], "output"),
        write(["And ", Instant(0.8)], "input"),
    ]
    lists = {
        "temporal_input_locations": [0.5, 0.8],
        "temporal_output_locations": [0.6, 0.7],
        "spatial_height_input_locations": [0.2, 0.4],
        "spatial_height_output_locations": [0.02, 0.04],
        "spatial_width_input_locations": [0.1, 0.3],
        "spatial_width_output_locations": [0.01, 0.03],
    }
    assert to_variables(turns) == lists
    assert from_variables([turn.text for turn in turns], lists) == turns
    more = {**lists, "temporal_input_locations": [0.5, 0.8, 0.9]}
    assert from_variables([turn.text for turn in turns], more) == turns
    del lists["spatial_width_output_locations"][1:]
    with pytest.raises(ValueError, match="expected 2 entries in spatial_width_output_locations, got 1"):
        from_variables([turn.text for turn in turns], lists)
    assert from_variables(["no coordinates"], {}) == [CoordinateText("no coordinates")]


@given(st.lists(mixed_parts(), max_size=3), st.sampled_from(["input", "output"]))
@settings(deadline=None)
def test_variables_round_trip(turns, side):
    texts = [write(parts, side) for parts in turns]
    assert from_variables([text.text for text in texts], to_variables(texts)) == texts


def test_many_items_are_written_in_linear_time():
    text = from_text(" [0.1, 0.2, 0.3, 0.4]" * 20_000, "input")
    assert read(text).parts == [BOX] * 20_000
