"""Prompts, answers and their parsers, and the table of them in docs/tasks.md."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_st.coordinate_text import CoordinateText, from_text, read, spell_out, write
from llava_st.evaluation.metrics import TASK_METRICS, EventTruth, TubeTruth
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.media import Media
from llava_st.tasks import TASKS, AnswerError, CaptionedSpan, Event, GroundedText, SpatioTemporal, map_items
from llava_st.video import sample_frame_indices

BOX = Box(0.1, 0.2, 0.3, 0.4)
TUBE = Tube((0.25, 0.5), (BOX, Box(0.2, 0.3, 0.4, 0.5)))
SPAN = TimeSpan(0.25, 0.75)
TABLE = Path(__file__).parents[2] / "docs" / "tasks.md"

fractions = st.floats(0, 1)
boxes = st.builds(Box, fractions, fractions, fractions, fractions)
spans = st.builds(TimeSpan, fractions, fractions)
instants = st.builds(Instant, fractions)
tubes = st.lists(st.tuples(fractions, boxes), min_size=1, max_size=4).map(
    lambda rows: Tube(tuple(time for time, _ in rows), tuple(box for _, box in rows))
)
# Words between which any punctuation may stand. The first and the last character are letters or digits.
word = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)
mark = st.sampled_from(
    [" ", ", ", ". ", ": ", "; ", " - ", "'", " (", ") ", " [", "] ", " {", "} ", "\n", " < ", "?! "]
)
sentences = st.lists(st.tuples(mark, word), max_size=4).flatmap(
    lambda rest: word.map(lambda start: start + "".join(a + b for a, b in rest))
)


def grounded_text(items):
    """Items with words in between, some of which end in a comma."""
    words = st.tuples(sentences, st.sampled_from(["", ",", " is at", " ("])).map("".join)
    pieces = st.lists(st.tuples(words, items), min_size=1, max_size=3)
    parts = st.tuples(pieces, sentences).map(lambda both: (*(part for piece in both[0] for part in piece), both[1]))
    return parts.map(GroundedText)


VALUES = {
    "stvg": st.builds(SpatioTemporal, spans, tubes),
    "svg": tubes,
    "elc": st.builds(Event, instants, sentences, tubes),
    "tvg": spans,
    "tr": sentences,
    "rec": boxes,
    "reg": sentences,
    "dgc": grounded_text(boxes),
    "dvc": st.lists(st.builds(CaptionedSpan, spans, sentences), min_size=1, max_size=3).map(tuple),
    "captioning": sentences,
    "qa": sentences,
    "temporal_grounded_conversation": grounded_text(instants | spans),
    "image_grounded_conversation": grounded_text(boxes),
    "conversation": sentences,
    "classification": sentences,
}
# Fields of prompts as docs/tasks.md shows them: a name stands for words, an item for itself.
FIELDS = {
    "stvg": {"question": "{question}"},
    "svg": {"question": "From <s> to <e>, {question}", "s": Instant(0.25), "e": Instant(0.75)},
    "elc": {"s": Instant(0.25), "box": BOX},
    "tvg": {"event": "{event}"},
    "tr": {"span": SPAN},
    "rec": {"event": "{event}"},
    "reg": {"box": BOX},
    "qa": {"question": "{question}"},
    "temporal_grounded_conversation": {"message": "{message}"},
    "image_grounded_conversation": {"message": "{message}"},
    "conversation": {"message": "{message}"},
}
# Answers as the table shows them.
EXAMPLES = {
    "stvg": SpatioTemporal(SPAN, TUBE),
    "svg": TUBE,
    "elc": Event(Instant(0.75), "{caption}", TUBE),
    "tvg": SPAN,
    "rec": BOX,
    "dgc": GroundedText(("{words}", BOX, "{words}")),
    "dvc": (CaptionedSpan(SPAN, "{caption}"), CaptionedSpan(SPAN, "{caption}")),
    "temporal_grounded_conversation": GroundedText(("{words}", SPAN, "{words}", Instant(0.5))),
    "image_grounded_conversation": GroundedText(("{words}", BOX, "{words}")),
}


def shown(parts):
    """Parts as the table shows them."""
    names = {Instant: "⟨time⟩", TimeSpan: "⟨span⟩", Box: "⟨box⟩", Tube: "⟨tube⟩"}
    text = ""
    for part in parts:
        text = text.rstrip() + f" {names[type(part)]} " if not isinstance(part, str) else text + part.lstrip()
    return re.sub(r" ([,.?])", r"\1", text).strip()


@pytest.mark.parametrize("name", TASKS)
def test_answers_come_back(name):
    task = TASKS[name]
    assert task.name == name

    @settings(max_examples=50, deadline=None)
    @given(VALUES[name])
    def check(value):
        parts = task.answer(value)
        assert task.parse(parts) == value
        written = write(parts, "output")
        assert task.parse(read(written).parts) == value
        assert task.parse(read(from_text(spell_out(written), "output")).parts) == value

    check()


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"stvg", "svg", "tvg", "rec"}))
def test_any_words_come_back_or_are_refused(name):
    """Whatever the words are: never another value."""
    anything = st.text(st.sampled_from(" ,.:;{}[]<>()\nab") | st.characters(), max_size=12)
    nasty = st.sampled_from([". Object bounding box:", "<TEMP-OUTPUT>", "<WIDTH-INPUT>", ":[", "{", ", ", ""])
    text = st.lists(anything | nasty, max_size=3).map("".join)

    def with_words(words):
        examples = {"elc": Event(Instant(0.75), words, TUBE), "dvc": (CaptionedSpan(SPAN, words),) * 2}
        grounded = {"dgc": BOX, "image_grounded_conversation": BOX, "temporal_grounded_conversation": Instant(0.5)}
        if name in grounded:
            return GroundedText((words, grounded[name], words))
        return examples.get(name, words)

    @settings(max_examples=100, deadline=None)
    @given(text.map(with_words))
    def check(value):
        try:
            parts = TASKS[name].answer(value)
        except ValueError:
            return
        assert TASKS[name].parse(read(write(parts, "output")).parts) == value

    check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elc", Event(Instant(0.5), "", TUBE)),
        ("elc", Event(Instant(0.5), " runs", TUBE)),
        ("elc", Event(Instant(0.5), "runs ", TUBE)),
        ("elc", Event(Instant(0.5), "at <TEMP-OUTPUT> he runs", TUBE)),
        ("elc", Event(Instant(0.5), "runs", Tube((), ()))),
        ("svg", Tube((), ())),
        ("svg", Tube((0.5,), (Box(0, 0, 640, 480),))),
        ("tvg", TimeSpan(3.5, 12.0)),
        ("tvg", TimeSpan(0.0, float("nan"))),
        ("rec", Box(-0.1, 0, 0.5, 0.5)),
        ("dvc", ()),
        ("dgc", GroundedText(("a man", "on", BOX))),
        ("dgc", GroundedText(("a man",))),
        ("temporal_grounded_conversation", GroundedText((Instant(0.5), ":", BOX))),  # reads as a tube
        ("qa", " yes"),
        ("qa", ""),
    ],
)
def test_values_that_would_come_back_as_others_are_refused(name, value):
    with pytest.raises(ValueError, match=r"<TEMP-OUTPUT>" if "<TEMP" in repr(value) else f"^{name}: ") as error:
        TASKS[name].answer(value)
    assert not isinstance(error.value, AnswerError)


@pytest.mark.parametrize(
    ("name", "parts", "reason"),
    [
        ("tvg", [], "expected a span {start, end}, got nothing"),
        ("tvg", ["It never happens."], "expected a span {start, end}, got 'It never happens.'"),
        ("tvg", ["From ", Instant(0.1), " on"], "expected a span {start, end}, got 'From (point in time) on'"),
        ("tvg", [TimeSpan(0.5, 1.5)], "expected coordinates from 0 to 1, got TimeSpan"),
        ("rec", [SPAN], "expected a box, got '(span {start, end})'"),
        ("rec", [Box(0, 0, float("nan"), 1)], "expected coordinates from 0 to 1"),
        ("svg", ["Object bounding box: ", BOX], "expected a tube"),
        ("stvg", [SPAN, "Object bounding box: "], "expected a tube"),
        ("stvg", ["Object bounding box: ", TUBE], "expected a span"),
        ("elc", ["Ends in , he runs. Object bounding box: ", TUBE], "expected a point in time"),
        ("elc", [SPAN, ", he runs. Object bounding box: ", TUBE], "expected a point in time"),
        ("elc", ["Ends in ", Instant(0.5), ", he runs."], "expected a tube"),
        ("elc", ["Ends in ", Instant(0.5), ", . Object bounding box: ", TUBE], "expected a caption"),
        ("elc", ["Ends in ", Instant(0.5), TUBE], "expected words, got none"),
        ("dvc", ["He runs."], "expected a span"),
        ("dvc", [SPAN, ", he runs. ", SPAN], "expected words, got none"),
        ("dvc", [SPAN, ", he runs. ", TimeSpan(0, 2), ", he stops."], "expected coordinates from 0 to 1"),
        ("dgc", ["A man."], "expected a box, got 'A man.'"),
        ("dgc", [BOX, "a man", Box(0, 0, 2, 2)], "expected coordinates from 0 to 1"),
        ("image_grounded_conversation", ["  "], "expected words, got none"),
        ("qa", ["\n"], "expected words, got none"),
    ],
)
def test_unparsable_answers_say_why(name, parts, reason):
    with pytest.raises(AnswerError, match=re.escape(reason)):
        TASKS[name].parse(parts)


@pytest.mark.parametrize(
    ("name", "parts", "value"),
    [
        ("tvg", ["It happens from", SPAN, ", not in", TimeSpan(0, 0.1)], SPAN),
        ("rec", ["The man is at", BOX, "."], BOX),
        ("stvg", [TUBE, " in", SPAN], SpatioTemporal(SPAN, TUBE)),
        ("elc", ["It ends in ", Instant(0.5), ": he runs. object bounding box ", TUBE, "."], ": he runs"),
        ("elc", ["Ends in ", Instant(0.5), ", a man, in a hat, rides ", TUBE], "a man, in a hat, rides"),
        ("elc", ["Ends in ", Instant(0.5), ", at ", Instant(0.25), " he falls. ", TUBE], "at 0.250 he falls"),
        ("dvc", ["Sure. ", SPAN, "he runs.\n", SPAN, ", he stops"], ("he runs", "he stops")),
        ("reg", ["A man in", BOX, ". "], "A man in [0.100, 0.200, 0.300, 0.400]."),
        ("dgc", ["A ", "man", BOX, BOX, ". "], GroundedText(("A man", BOX, BOX, "."))),
    ],
)
def test_wording_is_free(name, parts, value):
    found = TASKS[name].parse(parts)
    if name == "elc":
        value = Event(Instant(0.5), value, TUBE)
    if name == "dvc":
        value = tuple(CaptionedSpan(SPAN, caption) for caption in value)
    assert found == value


def test_a_malformed_box_costs_no_other():
    """The third of six boxes lacks a corner, and the answer ends within the last one."""
    before, behind = (write([Tube(times, (BOX, BOX))], "output") for times in ((0.1, 0.2), (0.4, 0.5)))
    broken = "<TEMP-OUTPUT>:[<WIDTH-OUTPUT><HEIGHT-OUTPUT><WIDTH-OUTPUT>]"
    text = CoordinateText(
        f"{before.text}, {broken}, {behind.text}, <TEMP-OUTPUT>:[<WIDTH-",
        (*before.positions, 0.3, 0.5, 0.5, 0.5, *behind.positions, 0.6),
    )
    tube = Tube((0.1, 0.2, 0.4, 0.5), (BOX,) * 4)
    assert TASKS["svg"].parse(read(text).parts) == tube
    event = CoordinateText(f"Ends in <TEMP-OUTPUT>, he runs. {text.text}", (0.75, *text.positions))
    assert TASKS["elc"].parse(read(event).parts) == Event(Instant(0.75), "he runs", tube)


def test_published_prompts():
    """The published phrasings, letter by letter: none of these strings comes from the code."""
    assert TASKS["tvg"].prompt(event="a dog barks") == [
        "Give you a textual query: 'a dog barks'. When does the described content occur in the video? Please return "
        "the start and end timestamps."
    ]
    assert [TASKS["rec"].prompt("the {cat}", wording=i)[0] for i in range(4)] == [
        "Where can I find the {cat} in this image?",
        "What part of this image contains the {cat}?",
        "Where does the {cat} appear in this image?",
        "Where is the {cat} situated within this image?",
    ]
    assert TASKS["stvg"].prompt("<video>\nWho sits?") == [
        "Who sits?Please firstly give the timestamps, and then give the spatial bounding box corresponding to each "
        "timestamp in the time period."
    ]
    suffix = "Please give the spatial bounding box corresponding to each timestamp in the time period."
    times = {"s": Instant(0.25), "e": Instant(0.75)}
    phrases = ["During the span of", "In the time range", "During the period", "Within the time frame of"]
    phrases += ["In the time period", "During", "Between", "At"]
    for i, phrase in enumerate(phrases):
        found = TASKS["svg"].prompt("<video>\nFrom <s> to <e>, where is he?", wording=i, **times)
        assert found == [f"{phrase} ", SPAN, f", where is he?{suffix}"]
    assert TASKS["elc"].prompt("Starts in <s>, who is in region <b1>?", s=Instant(0.25), b1=BOX) == [
        "Starts in ",
        Instant(0.25),
        ", who is in region ",
        BOX,
        "?Please firstly give the end timestamp, then give the event associated with the object/subject, finally give "
        "the spatial bounding box corresponding to each timestamp in the time period.",
    ]


def test_wordings_are_fixed_unless_drawn():
    assert TASKS["rec"].prompt("a cat") == TASKS["rec"].prompt("a cat", wording=0)
    draws = [TASKS["rec"].prompt("a cat", wording=Random(seed))[0] for seed in range(40)]
    assert draws == [TASKS["rec"].prompt("a cat", wording=Random(seed))[0] for seed in range(40)]
    assert len(set(draws)) == 4
    for wording in (4, -1):
        with pytest.raises(ValueError, match=f"wording: expected 0 to 3 or a random.Random, got {wording}"):
            TASKS["rec"].prompt("a cat", wording=wording)


def test_placeholders_and_items_must_match():
    with pytest.raises(ValueError, match=r"items: expected one for each of \['e', 's'\] in .*, got \['s'\]"):
        TASKS["svg"].prompt("From <s> to <e>, where is he?", s=Instant(0.25))
    with pytest.raises(ValueError, match=r"items: expected one for each of \[\] in .*, got \['box'\]"):
        TASKS["stvg"].prompt("Who sits?", box=BOX)


def test_optional_fields_of_prompts():
    assert TASKS["classification"].prompt(labels=["run", "sit"])[0].endswith("Choose one of: run, sit.")
    message = ["What is", BOX, "?"]
    assert TASKS["image_grounded_conversation"].prompt(message=message) == message


def test_items_of_every_value_change_units():
    media = Media("video", 200, 100, timestamps=(0.0, 10.0))
    box = Box(20.0, 20.0, 60.0, 40.0)
    assert map_items(EXAMPLES["dgc"], media.to_absolute) == GroundedText(("{words}", box, "{words}"))
    event = map_items(EXAMPLES["elc"], media.to_absolute)
    assert (event.end, event.caption, event.tube.times, event.tube.boxes[0]) == (
        Instant(7.5),
        "{caption}",
        (2.5, 5.0),
        box,
    )
    assert map_items(EXAMPLES["dvc"], media.to_absolute)[1].span == TimeSpan(2.5, 7.5)
    assert map_items(SPAN, media.to_absolute) == TimeSpan(2.5, 7.5)
    assert map_items("words", media.to_absolute) == "words"
    assert map_items(None, media.to_absolute) is None


@pytest.mark.parametrize("metrics", ["standard", "published"])
@pytest.mark.parametrize("name", TASK_METRICS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_oracle_scores_everything(name, metrics, data):
    """The truth, said, written, read, parsed and scored, is right in every sample."""
    first = data.draw(st.integers(0, 50))
    clip = (first, first + data.draw(st.integers(1, 300)))
    indices = sample_frame_indices(clip, data.draw(st.sampled_from([1, 8, 100])))
    frames = data.draw(st.sets(st.sampled_from(indices), min_size=1, max_size=5)) | {clip[1] + 5}
    # Corners of whole pixels, as annotated, and an area that is not nothing.
    corners = st.tuples(*map(st.integers, (0, 0, 400, 200), (300, 150, 640, 480)))
    tube = TubeTruth({frame: Box(*data.draw(corners)) for frame in frames}, indices, 640, 480)
    # A thousandth is what published truths are rounded to.
    start, length = data.draw(st.integers(0, 900)), data.draw(st.integers(1, 100))
    span = TimeSpan(start / 1000, (start + length) / 1000)
    box = Box(*(data.draw(st.integers(*limits)) / 1000 for limits in ((0, 400), (0, 400), (500, 999), (500, 999))))
    truth, value = {
        "stvg": (EventTruth(span, tube), SpatioTemporal(span, tube.tube())),
        "svg": (tube, tube.tube()),
        "elc": (EventTruth(span, tube), Event(Instant(span.end), "he rides", tube.tube())),
        "tvg": (span, span),
        "rec": (box, box),
    }[name]
    task = TASKS[name]
    said = spell_out(write(task.answer(value), "output"))
    predicted = task.parse(read(from_text(said, "output")).parts)
    scores = TASK_METRICS[name]([(predicted, truth)] * 2, metrics)
    assert [scores.pop(count) for count in ("samples", "unparsable", "missing")] == [2, 0, 0]
    for score, percent in scores.items():
        # The one published score that no answer gets: docs/evaluation.md.
        expected = 0 if name == "elc" and metrics == "published" and "tIoU" in score else 100
        assert percent == pytest.approx(expected, abs=1e-9), score


def test_the_table_of_tasks_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(TASKS)
    for name, row in rows:
        task = TASKS[name]
        media, prompt, answer, _, metric = (cell.strip() for cell in row.split(" | "))
        assert media == task.media
        assert prompt == f"`{shown(task.prompt(**FIELDS.get(name, {})))}`"
        assert answer == (f"`{shown(task.answer(EXAMPLES[name]))}`" if task.grounded else "words")
        assert (metric in ("-", "captions")) == (name not in TASK_METRICS)
