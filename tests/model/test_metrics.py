"""The metrics against cases worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llava_st.evaluation.metrics import (
    MISSING,
    TASK_METRICS,
    EventTruth,
    TubeTruth,
    box_iou,
    elc_caption,
    elc_metrics,
    rec_metrics,
    stvg_metrics,
    svg_metrics,
    temporal_iou,
    tube_iou,
    tvg_metrics,
)
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.tasks import Event, SpatioTemporal

BOTH = pytest.mark.parametrize("metrics", ["standard", "published"])
FULL = Box(0, 0, 1, 1)
LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)

# A clip of frames 10 to 14, all of them shown: frame 10 + i lies at i / 4. A picture of 100 x 50 pixels. Frames 11, 12
# and 13 have the left half; what is said of frame 99 lies outside of the clip.
HALF = Box(0, 0, 50, 50)
TRUTH = TubeTruth({11: HALF, 12: HALF, 13: HALF, 99: HALF}, (10, 11, 12, 13, 14), 100, 50)
EVENT = EventTruth(TimeSpan(0.25, 0.75), TRUTH, "a man, in a hat, rides a bike")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0.2, 0.6), (0.2, 0.6), 1),
        ((0, 0.5), (0.25, 1), 0.25),  # 0.25 in common, 1 from 0 to 1
        ((0, 1), (0.25, 0.75), 0.5),
        ((0, 0.25), (0.5, 1), 0),  # disjoint: hull 1 or union 0.75, 0 in common
        ((0, 0.5), (0.5, 1), 0),  # they touch
        ((0.5, 0.5), (0, 1), 0),  # an instant within a span
        ((0.5, 0.5), (0.5, 0.5), 1),  # the published formula divides by zero
        ((0.5, 0.5), (0.75, 0.75), 0),
        ((0.75, 0.25), (0, 1), 0),  # ends before it starts
        ((0.75, 0.25), (0.5, 0.5), 0),
    ],
)
def test_temporal_iou(a, b, expected):
    assert temporal_iou(TimeSpan(*a), TimeSpan(*b)) == expected
    assert temporal_iou(TimeSpan(*b), TimeSpan(*a)) == expected


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_hull_and_union_give_the_same_temporal_iou(times):
    a, b = sorted(times[:2]), sorted(times[2:])
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - overlap
    if union > 1e-9:
        assert temporal_iou(TimeSpan(*a), TimeSpan(*b)) == pytest.approx(overlap / union, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1),
        ((0, 0, 4, 4), (2, 2, 6, 6), 4 / 28),  # 2 x 2 in common, 16 + 16 - 4
        ((0, 0, 4, 4), (1, 1, 3, 2), 2 / 16),  # one within the other
        ((0, 0, 4, 4), (4, 0, 8, 4), 0),  # they touch
        ((0, 0, 1, 1), (2, 2, 3, 3), 0),  # apart in both directions: no product of two negative sides
        ((1, 1, 1, 3), (0, 0, 4, 4), 0),  # no width
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # no area at all
        ((4, 0, 0, 4), (0, 0, 4, 4), 0),  # left and right swapped
        ((4, 4, 0, 0), (0, 0, 4, 4), 0),  # both swapped: no area of (-4) x (-4)
    ],
)
def test_box_iou(a, b, expected):
    assert box_iou(Box(*a), Box(*b)) == expected
    assert box_iou(Box(*b), Box(*a)) == expected


def test_a_time_belongs_to_the_nearest_frame_that_was_shown():
    """Frames 0, 2, 5 lie at 0, 1/2, 1."""
    truth = TubeTruth({}, (0, 2, 5), 1, 1)
    assert [truth.frame(time) for time in (0, 0.24, 0.26, 0.5, 0.74, 0.76, 1)] == [0, 0, 2, 2, 2, 5, 5]
    assert TubeTruth({}, (7,), 1, 1).frame(1.0) == 7


def test_only_frames_that_were_shown_count():
    boxes = {frame: Box(frame, 0, 100, 50) for frame in range(6)}
    truth = TubeTruth(boxes, (0, 2, 5), 100, 50)
    assert truth.seen() == {0: boxes[0], 2: boxes[2], 5: boxes[5]}
    assert truth.tube() == Tube((0, 0.5, 1), (Box(0, 0, 1, 1), Box(0.02, 0, 1, 1), Box(0.05, 0, 1, 1)))
    assert tube_iou(truth.tube(), truth) == (1, 1)


@BOTH
@pytest.mark.parametrize(
    ("times", "boxes", "spatial", "video"),
    [
        ((0.25, 0.5, 0.75), (LEFT, LEFT, LEFT), 1, 1),  # identical
        ((0.25, 0.5, 0.75), (LEFT, FULL, RIGHT), 1.5 / 3, 1.5 / 3),  # IoUs 1, 1/2, 0
        ((0.5,), (LEFT,), 1, 1 / 3),  # one of three frames
        ((0.5, 0.75, 1), (LEFT, FULL, LEFT), 1.5 / 2, 1.5 / 4),  # frames 12, 13, 14: two in common, four in either
        ((0, 1), (LEFT, LEFT), 0, 0),  # frames 10 and 14: none in common, five in either
        ((0.25, 0.5, 0.75), (RIGHT, RIGHT, RIGHT), 0, 0),  # disjoint in space
        ((0.45, 0.55), (FULL, LEFT), 1, 1 / 3),  # both are frame 12: the last one counts
    ],
)
def test_tube_iou(metrics, times, boxes, spatial, video):
    assert tube_iou(Tube(times, boxes), TRUTH, metrics) == pytest.approx((spatial, video))


@BOTH
def test_tubes_without_frames_score_nothing(metrics):
    nothing = TubeTruth({99: HALF}, (10, 11, 12, 13, 14), 100, 50)
    assert nothing.tube() == Tube((), ())
    assert tube_iou(Tube((), ()), nothing, metrics) == (0, 0)
    assert tube_iou(Tube((), ()), TRUTH, metrics) == (0, 0)
    assert tube_iou(Tube((0.5,), (LEFT,)), nothing, metrics) == (0, 0)


def test_published_boxes_are_whole_pixels():
    """Right edge at 0.254 of 10 pixels: 2.54, published 3; the truth has 3. Halves go to even: 2.5 is 2."""
    truth = TubeTruth({0: Box(0, 0, 3, 10)}, (0,), 10, 10)
    tube = Tube((0,), (Box(0, 0, 0.254, 1),))
    assert tube_iou(tube, truth)[0] == pytest.approx(2.54 / 3)
    assert tube_iou(tube, truth, "published")[0] == 1
    assert tube_iou(Tube((0,), (Box(0, 0, 0.25, 1),)), truth, "published")[0] == pytest.approx(2 / 3)


def test_a_clip_shorter_than_its_samples():
    """Frames 0, 0, 1, 1: times 0 and 1/3 are frame 0. The perfect tube names each frame once."""
    truth = TubeTruth({0: HALF, 1: HALF}, (0, 0, 1, 1), 100, 50)
    assert truth.tube() == Tube((0, 2 / 3), (LEFT, LEFT))
    assert tube_iou(truth.tube(), truth) == (1, 1)
    assert tube_iou(Tube((0, 1 / 3), (LEFT, LEFT)), truth) == (1, 0.5)


def test_tvg():
    """IoUs 1, 1/2, 0 (disjoint), unparsable, without media."""
    whole, half = TimeSpan(0, 1), TimeSpan(0, 0.5)
    pairs = [(whole, whole), (half, whole), (half, TimeSpan(0.75, 1)), (None, whole), (MISSING, whole)]
    counts = {"samples": 5, "unparsable": 1, "missing": 1}
    # Of four samples: mean 1.5 / 4; at least 0.3: two; at least 0.5: two; at least 0.7: one.
    assert tvg_metrics(pairs) == {"mIoU": 37.5, "R@0.3": 50, "R@0.5": 50, "R@0.7": 25, **counts}
    # Above 0.5: one.
    assert tvg_metrics(pairs, "published") == {"mIoU": 37.5, "R@0.3": 50, "R@0.5": 25, "R@0.7": 25, **counts}


def test_published_answers_have_five_digits():
    predicted, truth = TimeSpan(0, 1 / 3), TimeSpan(0, 1)
    assert tvg_metrics([(predicted, truth)])["mIoU"] == pytest.approx(100 / 3, abs=1e-9)
    assert tvg_metrics([(predicted, truth)], "published")["mIoU"] == pytest.approx(33.333, abs=1e-9)
    box = Box(0, 0, 1 / 3, 1)
    # Exact: 0.33333... / 0.66666 > 0.5. Published: 0.33333 / 0.667 < 0.5.
    assert rec_metrics([(box, Box(0, 0, 0.66666, 1))])["Acc@0.5"] == 100
    assert rec_metrics([(box, Box(0, 0, 0.66666, 1))], "published")["Acc@0.5"] == 0


def test_rec():
    """Right (IoU 1), right (IoU 1/2, on the threshold), wrong, unparsable, without media."""
    pairs = [(FULL, FULL), (LEFT, FULL), (LEFT, RIGHT), (None, FULL), (MISSING, FULL)]
    counts = {"samples": 5, "unparsable": 1, "missing": 1}
    assert rec_metrics(pairs) == {"Acc@0.5": 50, **counts}  # 2 of 4
    assert rec_metrics(pairs, "published") == {"Acc@0.5": pytest.approx(200 / 3), **counts}  # 2 of 3


def test_published_rec_drops_what_is_unparsable():
    pairs = [(FULL, FULL), (None, FULL)]
    assert rec_metrics(pairs)["Acc@0.5"] == 50
    assert rec_metrics(pairs, "published")["Acc@0.5"] == 100
    assert rec_metrics([(None, FULL)])["Acc@0.5"] == 0
    assert rec_metrics([(None, FULL)], "published")["Acc@0.5"] is None


def test_published_rec_clips_true_boxes():
    """Truth 1.2 wide, 1 within the picture. The prediction, 0.55 wide: 0.55 / 1.2 < 0.5 <= 0.55 / 1."""
    pairs = [(Box(0, 0, 0.55, 1), Box(0, 0, 1.2, 1))]
    assert rec_metrics(pairs)["Acc@0.5"] == 0
    assert rec_metrics(pairs, "published")["Acc@0.5"] == 100


@BOTH
def test_svg(metrics):
    perfect = Tube((0.25, 0.5, 0.75), (LEFT,) * 3)
    shifted = Tube((0.5, 0.75, 1), (LEFT, FULL, LEFT))  # sIoU 1.5 / 2, vIoU 1.5 / 4
    pairs = [(perfect, TRUTH), (shifted, TRUTH), (None, TRUTH), (MISSING, TRUTH)]
    assert svg_metrics(pairs, metrics) == {
        "m_sIoU": pytest.approx(100 * 1.75 / 3),
        "sIoU@0.3": pytest.approx(200 / 3),
        "sIoU@0.5": pytest.approx(200 / 3),
        "sIoU@0.7": pytest.approx(200 / 3),
        "m_vIoU": pytest.approx(100 * 1.375 / 3),
        "vIoU@0.3": pytest.approx(200 / 3),
        "vIoU@0.5": pytest.approx(100 / 3),
        "vIoU@0.7": pytest.approx(100 / 3),
        "samples": 4,
        "unparsable": 1,
        "missing": 1,
    }


@BOTH
def test_stvg(metrics):
    perfect = SpatioTemporal(TimeSpan(0.25, 0.75), Tube((0.25, 0.5, 0.75), (LEFT,) * 3))
    late = SpatioTemporal(TimeSpan(0.5, 0.75), Tube((0.5,), (FULL,)))  # tIoU 1/2, sIoU 1/2, vIoU 1/6
    found = stvg_metrics([(perfect, EVENT), (late, EVENT), (None, EVENT), (MISSING, EVENT)], metrics)
    assert found.pop("m_tIoU") == found.pop("m_sIoU") == 50  # 1.5 / 3
    assert found.pop("m_vIoU") == pytest.approx(100 * (1 + 1 / 6) / 3)
    # Shares are of what reaches the threshold, in both metrics.
    assert found["tIoU@0.5"] == found["sIoU@0.5"] == pytest.approx(200 / 3)
    assert found["tIoU@0.7"] == found["sIoU@0.7"] == found["vIoU@0.3"] == pytest.approx(100 / 3)
    assert (found["samples"], found["unparsable"], found["missing"]) == (4, 1, 1)


def test_published_true_spans_have_three_digits():
    """From 0 to 1/3; published 0.333: 0.333 / (1/3) = 0.999 for the perfect answer."""
    truth = EventTruth(TimeSpan(0, 1 / 3), TRUTH)
    pairs = [(SpatioTemporal(truth.span, TRUTH.tube()), truth)]
    assert stvg_metrics(pairs)["m_tIoU"] == 100
    assert stvg_metrics(pairs, "published")["m_tIoU"] == pytest.approx(99.9)


def test_elc():
    tube = Tube((0.25, 0.5, 0.75), (LEFT,) * 3)
    right, early = Event(Instant(0.75), "", tube), Event(Instant(0.5), "", tube)
    before = Event(Instant(0.125), "", tube)  # ends before it starts
    pairs = [(right, EVENT), (early, EVENT), (before, EVENT), (None, EVENT), (MISSING, EVENT)]
    found = elc_metrics(pairs)
    assert found["m_tIoU"] == 37.5  # (1 + 0.25 / 0.5 + 0 + 0) / 4
    assert (found["tIoU@0.3"], found["tIoU@0.5"], found["tIoU@0.7"]) == (50, 50, 25)
    assert found["m_sIoU"] == found["m_vIoU"] == 75
    assert (found["samples"], found["unparsable"], found["missing"]) == (5, 1, 1)


def test_published_elc_finds_no_span():
    perfect = Event(Instant(0.75), EVENT.caption, TRUTH.tube())
    found = elc_metrics([(perfect, EVENT)], "published")
    assert [found[name] for name in ("m_tIoU", "tIoU@0.3", "tIoU@0.5", "tIoU@0.7")] == [0, 0, 0, 0]
    assert found["m_sIoU"] == found["m_vIoU"] == 100


def test_elc_captions():
    assert elc_caption("a man, in a hat, rides a bike") == "a man, in a hat, rides a bike"
    assert elc_caption("a man, in a hat, rides a bike", "published") == "rides a bike"
    assert elc_caption("rides a bike", "published") == "rides a bike"
    assert elc_caption("He rides. Then, he stops", "published") == "He rides"
    assert elc_caption("he waits, 2.5 hours long.", "published") == "2.5 hours long"
    assert elc_caption("", "published") == ""


@BOTH
@pytest.mark.parametrize("task", TASK_METRICS)
def test_nothing_to_score(metrics, task):
    """No mean of nothing: None, neither 0 nor an error."""
    found = TASK_METRICS[task]([], metrics)
    assert [found.pop(name) for name in ("samples", "unparsable", "missing")] == [0, 0, 0]
    assert set(found.values()) == {None}
    found = TASK_METRICS[task](iter([(MISSING, EVENT)]), metrics)
    assert [found.pop(name) for name in ("samples", "unparsable", "missing")] == [1, 0, 1]
    assert set(found.values()) == {None}


@pytest.mark.parametrize("task", TASK_METRICS)
def test_other_metrics_are_refused(task):
    with pytest.raises(ValueError, match="metrics: expected .*, got 'paper'"):
        TASK_METRICS[task]([], "paper")
