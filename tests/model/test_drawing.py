"""Answers drawn on pictures and videos, on a timeline and in a page: boxes lie where they should, when they should."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest
from llava_st.answer import Answer
from llava_st.drawing.page import write_image_page, write_video_page
from llava_st.drawing.pictures import COLOURS, annotate_image, annotate_video, box_at, drawing_size, is_shown, marks
from llava_st.drawing.pictures import draw as draw_marks
from llava_st.drawing.pictures import write_video as write_shots
from llava_st.drawing.timeline import MAX_ROWS, plot_timeline
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.tasks import CaptionedSpan, Event
from llava_st.video import displayed_frames
from PIL import Image

from .clips import write_video

TUBE = Tube((1.0, 2.0, 4.0), (Box(10, 20, 30, 60), Box(20, 20, 40, 60), Box(80, 40, 120, 50)))


def answer_of(*parts, **fields) -> Answer:
    return Answer(parts, "".join(str(part) for part in parts), **fields)


def outline(picture: np.ndarray, colour: str) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is nearly of a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(picture.astype(int) - wanted).max(axis=2) < 40)
    return None if len(rows) == 0 else (columns.min(), rows.min(), columns.max(), rows.max())


def grey_frames(count: int, width: int = 480, height: int = 320):
    return [np.full((height, width, 3), 128, np.uint8)] * count


def test_a_tube_moves_evenly_between_its_times():
    assert box_at(TUBE, 1.0, 1.1) == Box(10, 20, 30, 60)
    assert box_at(TUBE, 1.5, 1.6) == Box(15, 20, 35, 60)
    assert box_at(TUBE, 3.0, 3.1) == Box(50, 30, 80, 55)
    assert box_at(TUBE, 4.0, 4.1) == Box(80, 40, 120, 50)
    assert box_at(TUBE, 0.5, 1.0) is None
    assert box_at(TUBE, 4.01, 4.1) is None


def test_a_frame_that_is_displayed_while_a_tube_begins_or_ends_shows_it():
    assert box_at(TUBE, 0.9, 1.1) == Box(10, 20, 30, 60)
    assert box_at(TUBE, 3.9, math.inf) == Box(77, 39, 116, 50.5)
    once = Tube((2.5,), (Box(1, 2, 3, 4),))
    assert [box_at(once, k, k + 1) for k in range(4)] == [None, None, Box(1, 2, 3, 4), None]


def test_a_tube_begins_with_its_frame_in_spite_of_rounding():
    third = 1 / 3
    tube = Tube((third - 1e-12, 2 * third + 1e-12), (Box(0, 0, 1, 1), Box(0, 0, 1, 1)))
    shown = [box_at(tube, k * third, (k + 1) * third) is not None for k in range(4)]
    assert shown == [False, True, True, False]


def test_what_a_model_may_say_in_disorder():
    """Times that descend or repeat, corners the wrong way round."""
    tube = Tube((2.0, 1.0, 2.0), (Box(0, 0, 1, 1), Box(30, 60, 10, 20), Box(20, 20, 40, 60)))
    assert box_at(tube, 1.0, 1.1) == Box(10, 20, 30, 60)
    assert box_at(tube, 2.0, 2.1) == Box(20, 20, 40, 60)
    assert box_at(Box(9, 8, 1, 2), 0, 1) == Box(1, 2, 9, 8)
    assert is_shown(TimeSpan(5.0, 3.0), 4.0, 4.1)
    assert marks(answer_of(Tube((), ()))) == []


def test_spans_and_instants_are_shown_in_their_time():
    times = [k / 2 for k in range(8)]
    assert [t for t in times if is_shown(TimeSpan(1.0, 2.0), t, t + 0.5)] == [1.0, 1.5, 2.0]
    assert [t for t in times if is_shown(Instant(1.0), t, t + 0.5)] == [1.0, 1.5]
    assert box_at(TimeSpan(0, 9), 1, 2) is box_at(Instant(1), 1, 2) is None


def test_items_are_named_by_the_words_before_them():
    box, span = Box(0, 0, 1, 1), TimeSpan(0, 1)
    words = "and then, after a long while in which nothing happens, a man in red"
    found = marks(answer_of(" A dog: ", box, " in ", span, box, "\ufffd\x00\x1b[", box, f"{words} (", box, ") end"))
    assert [mark.label for mark in found] == ["A dog", "in", "box 3", "box 4", "…" + words[-39:].lstrip()]
    assert [mark.item for mark in found] == [box, span, box, box, box]
    assert [mark.colour for mark in found] == list(COLOURS[:5])


def test_captions_of_a_task_name_items():
    spans = [CaptionedSpan(TimeSpan(0, 1), "one"), CaptionedSpan(TimeSpan(1, 2), "two")]
    found = marks(answer_of(spans[0].span, ", one. ", spans[1].span, ", two. ", value=tuple(spans)))
    assert [(mark.label, mark.item) for mark in found] == [("one", TimeSpan(0, 1)), ("two", TimeSpan(1, 2))]
    found = marks(answer_of("Ends in ", Instant(3), value=Event(Instant(3), "a fall", TUBE)))
    assert [(mark.label, mark.item) for mark in found] == [("a fall", Instant(3)), ("a fall", TUBE)]


@pytest.mark.parametrize(
    ("size", "drawing"),
    [
        ((640, 272), (640, 272)),
        ((641, 273), (640, 272)),
        ((64, 48), (480, 360)),
        ((3840, 2160), (1280, 720)),
        ((1, 1), (480, 480)),
        ((10_000, 1), (1280, 2)),
    ],
)
def test_drawings_are_neither_tiny_nor_huge(size, drawing):
    assert drawing_size(*size) == drawing


def test_boxes_and_labels_on_a_picture(tmp_path):
    """The box where it belongs, its label above it, also for a picture that is drawn larger."""
    answer = answer_of("a thing ", Box(20, 40, 60, 70), TimeSpan(0, 1))
    annotate_image(answer, np.full((80, 120, 3), 128, np.uint8), tmp_path / "annotated.png")
    picture = np.array(Image.open(tmp_path / "annotated.png"))
    assert picture.shape == (320, 480, 3)
    left, top, right, bottom = outline(picture, COLOURS[0])
    assert (left, right, bottom) == (80, 240, 280)
    assert 130 < top < 150
    assert (picture[162:278, 84:236] == 128).all()
    assert outline(picture, COLOURS[1]) is None  # a span has no place on a picture


def test_boxes_over_the_edge_and_labels_at_it():
    picture = Image.new("RGB", (480, 320))
    found = marks(answer_of("over the edge", Box(-50, -50, 600, 400), "corner", Box(479, 0, 480, 1)))
    draw_marks(picture, found, 0, 1, (480, 320))
    left, top, right, bottom = outline(np.array(picture), COLOURS[1])
    assert (top, right) == (0, 479)
    assert bottom > 10
    assert left < 450


def test_a_box_and_a_span_on_a_video(tmp_path):
    """Ten frames of 0.5 s: the tube's box where it is at that time, the span's name in its time at the bottom."""
    answer = answer_of(
        "moves ", Tube((1.0, 3.0), (Box(40, 100, 140, 200), Box(240, 100, 340, 200))), "s", TimeSpan(2, 9)
    )
    annotate_video(answer, grey_frames(10), tmp_path / "annotated.mp4", fps=2)
    frames = list(displayed_frames(tmp_path / "annotated.mp4"))
    assert [second for second, *_ in frames] == pytest.approx([k / 2 for k in range(10)])
    for second, picture, width, height in frames:
        assert (width, height) == (480, 320)
        found = outline(picture, COLOURS[0])
        if 1 <= second <= 3:
            left = 40 + 100 * (second - 1)
            assert np.abs(np.array(found)[[0, 2, 3]] - [left, left + 100, 200]).max() <= 3
        else:
            assert found is None
        name = outline(picture, COLOURS[1])
        assert (name is not None) == (second >= 2)
        assert name is None or (name[0] <= 2 and name[3] >= 317)


def test_boxes_are_in_the_displayed_orientation(tmp_path):
    """A clip that is turned by a quarter and has wide pixels: 96 x 64 pixels become 64 x 192."""
    path = write_video(tmp_path / "phone.mp4", grey_frames(3, 96, 64), rotation=90, pixel_aspect=Fraction(2))
    annotate_video(answer_of(Box(0, 96, 32, 192)), path, tmp_path / "annotated.mp4")
    for _, picture, width, height in displayed_frames(tmp_path / "annotated.mp4"):
        assert (width, height) == (160, 480)
        left, _, right, bottom = outline(picture, COLOURS[0])
        assert left <= 2
        assert abs(right - 80) <= 3
        assert bottom >= 477


def test_times_of_a_clip_whose_rate_varies_are_kept(tmp_path):
    times = [0, 40, 500, 520, 1700, 1740]
    path = write_video(tmp_path / "phone.mp4", grey_frames(6, 64, 48), milliseconds=times)
    annotate_video(answer_of("text"), path, tmp_path / "annotated.mp4")
    assert [s for s, *_ in displayed_frames(tmp_path / "annotated.mp4")] == pytest.approx([t / 1000 for t in times])


def test_a_video_without_frames(tmp_path):
    with pytest.raises(ValueError, match="no frames to write"):
        write_shots([], tmp_path / "none.mp4")


def test_the_timeline(tmp_path):
    """Bars and lines where they belong: 10 s lie between the edges of the axes."""
    answer = answer_of("a $x", TimeSpan(2.5, 7.5), "b", Instant(5.0), "c", TUBE, Box(0, 0, 1, 1))
    plot_timeline(answer, 10.0, tmp_path / "timeline.png", "What costs $5 or $6?")
    picture = np.array(Image.open(tmp_path / "timeline.png").convert("RGB"))
    span, instant, tube = (outline(picture, colour) for colour in COLOURS[:3])
    second = (span[2] - span[0]) / 5
    assert (instant[0] + instant[2]) / 2 == pytest.approx((span[0] + span[2]) / 2, abs=3)
    assert tube[0] == pytest.approx(span[0] - 1.5 * second, abs=4)
    assert tube[2] == pytest.approx(span[0] + 1.5 * second, abs=4)
    assert span[3] < instant[1] < instant[3] < tube[1]
    assert outline(picture, COLOURS[3]) is None


def test_timelines_of_nothing_and_of_very_much(tmp_path):
    plot_timeline(answer_of("words"), 0.0, tmp_path / "empty.png")
    plot_timeline(answer_of(*[Instant(k) for k in range(300)]), 300.0, tmp_path / "full.png", "all")
    assert 40 * MAX_ROWS < Image.open(tmp_path / "full.png").size[1] < 80 * MAX_ROWS


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.sources, self.scripts = [], [], [], []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "poster", "action")]

    def handle_endtag(self, tag):
        while self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text.append(data)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & @DATA@ \u2028"


@pytest.fixture
def video_page(tmp_path):
    answer = answer_of(HOSTILE, TUBE, "s", TimeSpan(3, 2), problems=(HOSTILE,))
    write_video_page(answer, grey_frames(6, 160, 100), tmp_path / "page.html", HOSTILE, fps=1)
    return Page((tmp_path / "page.html").read_text())


def test_a_page_says_text_as_it_is(video_page):
    assert video_page.tags.count("script") == 2
    assert "img" not in video_page.tags
    assert "".join(video_page.text).count(HOSTILE) == 4  # title, prompt, answer, problem
    assert json.loads(video_page.scripts[0])["marks"][0]["label"].endswith("@DATA@")


def test_a_page_needs_nothing_from_elsewhere(video_page):
    assert [source[:22] for source in video_page.sources] == ["data:video/mp4;base64,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", "".join(video_page.scripts))


def test_a_page_holds_the_clip_and_the_box_of_each_frame(video_page, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(video_page.sources[0].split(",")[1]))
    frames = list(displayed_frames(tmp_path / "clip.mp4"))
    data = json.loads(video_page.scripts[0])
    assert [second for second, *_ in frames] == data["times"] == [0, 1, 2, 3, 4, 5]
    assert data["duration"] == 6
    assert (frames[0][2], frames[0][3]) == (480, 300)
    tube, span = data["marks"]
    assert (tube["first"], tube["start"], tube["end"]) == (1, 1, 4)
    for box, expected in zip(tube["boxes"], [box_at(TUBE, t, t + 1) for t in (1, 2, 3, 4)], strict=True):
        edges = (expected.left / 160, expected.top / 100, expected.right / 160, expected.bottom / 100)
        assert box == pytest.approx(edges, abs=1e-4)
    assert (span["boxes"], span["start"], span["end"]) == ([], 2, 3)


def test_the_page_of_a_picture(tmp_path):
    answer = answer_of("a thing", Box(20, 40, 60, 70), Instant(1))
    write_image_page(answer, np.full((80, 120, 3), 128, np.uint8), tmp_path / "page.html", "Where?")
    page = Page((tmp_path / "page.html").read_text())
    kind, content = page.sources[0].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (480, 320)
    (mark,) = json.loads(page.scripts[0])["marks"]
    assert mark["label"] == "a thing"
    assert mark["boxes"] == [pytest.approx([20 / 120, 0.5, 0.5, 70 / 80], abs=1e-4)]
