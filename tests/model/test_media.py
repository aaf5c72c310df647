"""Fractions, seconds and pixels, and the package without transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llava_st.answer import Answer
from llava_st.geometry import Box, Instant, TimeSpan, Tube
from llava_st.media import Media

CLIP = Media("video", width=640, height=480, timestamps=(1.0, 2.0, 4.0, 8.0))


@pytest.mark.parametrize(
    ("fraction", "seconds"), [(0, 1), (1 / 3, 2), (0.5, 3), (2 / 3, 4), (5 / 6, 6), (1, 8), (-0.2, 1), (1.7, 8)]
)
def test_seconds_follow_the_timestamps(fraction, seconds):
    assert CLIP.seconds(fraction) == pytest.approx(seconds)
    if 0 <= fraction <= 1:
        assert CLIP.fraction(seconds) == pytest.approx(fraction)


def test_seconds_outside_the_clip_are_its_ends():
    assert CLIP.fraction(0) == 0
    assert CLIP.fraction(100) == 1


def test_repeated_frames_take_the_first_fraction():
    clip = Media("video", 10, 10, timestamps=(0.0, 0.0, 1.0, 1.0, 2.0, 2.0))
    assert clip.fraction(0.0) == 0
    assert clip.fraction(1.0) == pytest.approx(2 / 5, abs=1 / 5)
    assert clip.fraction(2.0) == pytest.approx(4 / 5)
    assert clip.seconds(clip.fraction(1.0)) == 1


def test_a_single_frame_is_the_start():
    image = Media("image", 10, 10)
    assert image.seconds(0.7) == 0
    assert image.fraction(3.0) == 0


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
    st.tuples(*[st.integers(1, 4000)] * 2),
)
def test_units_are_inverse_to_each_other(steps, first, second, size):
    times = [0.0]
    for step in steps:
        times.append(times[-1] + step)
    clip = Media("video", *size, timestamps=tuple(times))
    low, high = sorted((first, second))
    box = Box(low, second, high, first)
    for item in (Instant(first), TimeSpan(low, high), box, Tube((low, high), (box, box))):
        again = clip.to_fractions(clip.to_absolute(item))
        assert type(again) is type(item)
        for one, other in zip(numbers(again), numbers(item), strict=True):
            assert one == pytest.approx(other, abs=1e-9)


def numbers(item) -> list[float]:
    if isinstance(item, Tube):
        return [*item.times, *(n for box in item.boxes for n in numbers(box))]
    return list(vars(item).values())


def test_boxes_are_in_pixels_of_the_displayed_picture():
    assert CLIP.to_absolute(Box(0, 0.25, 0.5, 1)) == Box(0, 120, 320, 480)


def test_tubes_need_a_box_per_time():
    with pytest.raises(ValueError, match="got 1 boxes and 2 times"):
        Tube((0.1, 0.2), (Box(0, 0, 1, 1),))
    assert Tube((0.1, 0.4), (Box(0, 0, 1, 1),) * 2).span == TimeSpan(0.1, 0.4)


def test_an_answer_knows_its_items():
    assert Answer(("from ", Instant(1.0), " on"), "from 1.0 s on").items == (Instant(1.0),)


def test_videos_are_read_without_transformers():
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
import llava_st.video
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
