"""Videos of every kind to pixels and Media: files (found frames, phones' pictures, damage), folders, arrays, lists."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from llava_st import decoding
from llava_st import video as video_module
from llava_st.image import preprocess
from llava_st.video import load_video, read_frames, sample_frame_indices
from PIL import Image

from .clips import copy_video, moving_square, write_sound, write_video

SEEKABLE = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264-open.mp4": {"codec_options": {"x264-params": "open-gop=1:bframes=3"}},
    "hevc.mp4": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none:open-gop=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"lag-in-frames": "16", "deadline": "realtime"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
# Packets do not tell the frames: no times, hidden packets, no index.
SEQUENTIAL = {
    "raw.h264": {},
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
    "h264.ts": {},
    "vp8.webm": {"codec": "libvpx", "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
}
COUNT = 60


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """Gives the file of each name above, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_video(folder / name, moving_square(COUNT), **{**SEEKABLE, **SEQUENTIAL}[name])
        return made[name]

    return get


def fully_decoded(path: Path, indices) -> torch.Tensor:
    return preprocess(read_frames(path, indices), 32)


class DecodedFrames:
    """Counts the frames that were decoded."""

    def __init__(self, monkeypatch):
        self.count, decode = 0, decoding._decode

        def counted(container, stream):
            for frame in decode(container, stream):
                self.count += 1
                yield frame

        monkeypatch.setattr(decoding, "_decode", counted)


@pytest.mark.parametrize("name", [*SEEKABLE, *SEQUENTIAL])
@pytest.mark.parametrize(("num_frames", "clip"), [(3, None), (100, None), (7, (10, 50)), (5, (37, 37))])
def test_frames_are_those_of_a_full_decode(clip_file, name, num_frames, clip):
    path = clip_file(name)
    pixels, media = load_video(path, num_frames, 32, clip)
    indices = sample_frame_indices(clip or COUNT, num_frames)
    assert torch.equal(pixels, fully_decoded(path, indices))
    assert (media.kind, media.width, media.height) == ("video", 64, 48)
    assert media.indices == tuple(indices)
    assert media.timestamps == pytest.approx([k / 25 for k in indices], abs=1e-3)
    assert media.source == str(path)


@pytest.mark.parametrize("name", SEEKABLE)
def test_few_frames_are_found_without_decoding_all(clip_file, name, monkeypatch):
    """A frame needs no more than what lies between it and the key frame before, even the last frame alone."""
    decoded = DecodedFrames(monkeypatch)
    load_video(clip_file(name), 1, 32, (COUNT - 1, COUNT - 1))
    assert 1 <= decoded.count <= 30


@pytest.mark.parametrize("name", SEEKABLE)
def test_the_index_of_packets_is_that_of_the_decoder(clip_file, name):
    packets = decoding.index_packets(str(clip_file(name)))
    assert packets.pts == decoding.index_frames(str(clip_file(name)), packets).pts
    assert len(packets.starts) >= 2


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_where_packets_do_not_tell_frames_all_are_decoded(clip_file, name):
    assert decoding.index_packets(str(clip_file(name))).starts == ()


def test_packets_that_promise_other_frames_are_not_believed(clip_file, monkeypatch):
    """As if one packet held no picture: the second attempt decodes all."""
    path, index_packets = clip_file("h264.mp4"), decoding.index_packets

    def wrong(name):
        index = index_packets(name)
        pts = list(index.pts)
        pts[20:20] = [pts[20] - 1]
        return decoding.replace(index, pts=tuple(pts))

    monkeypatch.setattr(video_module, "index_packets", wrong)
    pixels, media = load_video(path, 30, 32)
    assert max(media.indices) == COUNT - 1
    assert torch.equal(pixels, fully_decoded(path, media.indices))


def test_frames_before_the_start_of_an_edit_do_not_count(clip_file, tmp_path):
    """What a phone leaves behind that trims a video: packets that are decoded but not displayed."""
    path = copy_video(clip_file("h264.mp4"), tmp_path / "trimmed.mp4", shift=5)
    pixels, media = load_video(path, 4, 32)
    assert media.indices == tuple(sample_frame_indices(COUNT - 5, 4))
    assert media.timestamps == pytest.approx([k / 25 for k in media.indices])
    assert torch.equal(pixels, fully_decoded(clip_file("h264.mp4"), [k + 5 for k in media.indices]))


# The picture has a bright top left quarter: where does it go? (rotation is counter-clockwise, mirrors act after it)
CORNERS = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}


def bright_corner(pixels: torch.Tensor) -> str:
    quarters = pixels[0].mean(0).unfold(0, 16, 16).unfold(1, 16, 16).mean((2, 3))
    assert quarters.flatten().sort().values[-2] < -0.5 < 0.5 < quarters.max()
    return CORNERS[divmod(int(quarters.argmax()), 2)]


def corner_frames(count: int = 3):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255
    return [frame] * count


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("rotation", "mirrored", "corner"),
    [
        (0, False, "top left"),
        (90, False, "bottom left"),
        (180, False, "bottom right"),
        (270, False, "top right"),
        (0, True, "top right"),
        (90, True, "bottom right"),
    ],
)
def test_phone_pictures_are_turned(tmp_path, container, rotation, mirrored, corner):
    path = write_video(tmp_path / f"phone.{container}", corner_frames(), rotation=rotation, mirrored=mirrored)
    pixels, media = load_video(path, 2, 32)
    assert bright_corner(pixels) == corner
    assert (media.width, media.height) == ((32, 64) if rotation % 180 else (64, 32))


def test_a_portrait_clip_as_phones_write_it(tmp_path):
    """The matrix in the track header's bytes as in QuickTime's documents: x' = -y, y' = x, a quarter clockwise."""
    path = write_video(tmp_path / "portrait.mp4", corner_frames())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    for i, value in enumerate([0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30]):
        data[matrix + 4 * i : matrix + 4 * i + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    pixels, media = load_video(path, 1, 32)
    assert bright_corner(pixels) == "top right"
    assert (media.width, media.height) == (32, 64)


@pytest.mark.parametrize(("rotation", "size"), [(None, (85, 48)), (90, (48, 85))])
def test_pixels_that_are_not_square_widen_the_display(tmp_path, rotation, size):
    path = write_video(tmp_path / "wide.mp4", moving_square(3), pixel_aspect=Fraction(4, 3), rotation=rotation)
    _, media = load_video(path, 2, 32)
    assert (media.width, media.height) == size


def test_seconds_come_from_the_file_where_the_frame_rate_varies(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 300, 40)).tolist()
    path = write_video(tmp_path / "phone.mp4", moving_square(40), milliseconds=times)
    _, media = load_video(path, 17, 32)
    assert media.timestamps == pytest.approx([(times[k] - times[0]) / 1000 for k in media.indices], abs=1e-3)
    _, media = load_video(path, 5, 32, clip=(10, 30))
    assert media.timestamps == pytest.approx([(times[k] - times[0]) / 1000 for k in media.indices], abs=1e-3)
    _, media = load_video(path, 5, 32, fps=10)
    assert media.timestamps == pytest.approx([k / 10 for k in media.indices])


def test_folders_arrays_and_lists_give_what_a_file_gives(clip_file, tmp_path):
    frames = read_frames(clip_file("h264.mp4"), range(12))
    expected = preprocess([frames[k] for k in sample_frame_indices(12, 5)], 32)
    for k in reversed(range(12)):  # names whose alphabetical order is another
        Image.fromarray(frames[k]).save(tmp_path / f"frame{k}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".frame0.png").write_text("no picture")
    array = np.stack(frames)
    tensor = torch.from_numpy(array)
    pictures = [Image.fromarray(frame) for frame in frames]
    for source in (tmp_path, array, tensor, tensor.permute(0, 3, 1, 2), array.transpose(0, 3, 1, 2), pictures, frames):
        pixels, media = load_video(source, 5, 32)
        assert torch.equal(pixels, expected)
        assert (media.width, media.height) == (64, 48)
        assert media.indices == media.timestamps == tuple(sample_frame_indices(12, 5))
    assert load_video(tmp_path, 5, 32)[1].source == str(tmp_path)
    assert media.source is None
    pixels, media = load_video(array, 3, 32, clip=(2, 6), fps=2.0)
    assert media.timestamps == (1.0, 2.0, 3.0)
    assert torch.equal(pixels, preprocess([frames[k] for k in (2, 4, 6)], 32))


def test_arrays_that_can_be_read_both_ways():
    """Three rows of pixels and three columns: tensors have channels first, arrays last."""
    array = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
    _, media = load_video(array, 2, 8)
    assert (media.width, media.height) == (5, 3)
    _, media = load_video(torch.from_numpy(array), 2, 8)
    assert (media.width, media.height) == (3, 5)


def test_one_pixel_and_one_frame(tmp_path):
    path = write_video(tmp_path / "dot.mkv", [np.full((1, 1, 3), 255, np.uint8)], codec="ffv1")
    pixels, media = load_video(path, 4, 16)
    assert (media.width, media.height, media.indices) == (1, 1, (0, 0, 0, 0))
    torch.testing.assert_close(pixels, torch.ones(4, 3, 16, 16), rtol=0, atol=0.02)
    pixels, _ = load_video(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), 3, 16)
    assert (pixels == -1).all()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, "no frames"),
        ([], ValueError, "no frames"),
        (np.zeros((2, 0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((2, 4, 4), np.uint8), ValueError, r"expected \[T, H, W, 3\] or \[T, 3, H, W\], got \[2, 4, 4\]"),
        (np.zeros((2, 4, 4, 3)), TypeError, "uint8.* float64"),
        (Image.new("RGB", (4, 4)), TypeError, "expected a file.* Image"),
    ],
)
def test_sources_that_are_no_videos(source, error, message):
    with pytest.raises(error, match=message):
        load_video(source, 2, 16)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4: no such"):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match=r"sound\.wav: has no video stream"):
        load_video(write_sound(tmp_path / "sound.wav"))
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(ValueError, match=r"noise\.mp4: cannot be decoded"):
        load_video(tmp_path / "noise.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4: cannot be decoded"):
        load_video(tmp_path / "empty.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: has no frames"):
        load_video(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4: is not a file"):
        load_video(tmp_path / "pipe.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"list\.mp4: "):
        load_video(tmp_path / "list.mp4")


def test_a_video_without_frames(tmp_path):
    """Its header announces a video stream, but no packet is there."""
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match=r"none\.mkv: (has no frames|cannot be decoded|has a video stream of)"):
        load_video(path, 2, 16)


def test_clips_and_rates_out_of_range(clip_file):
    path = clip_file("h264.mp4")
    for clip in [(0, COUNT), (-1, 3), (5, 4)]:
        with pytest.raises(ValueError, match=r"h264\.mp4: clip: expected 0 <= first <= last < 60"):
            load_video(path, 2, 16, clip)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        load_video(path, 0, 16)
    with pytest.raises(ValueError, match="fps: expected a positive number, got 0"):
        load_video(path, 2, 16, fps=0)


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_a_file_that_was_cut_off(tmp_path, container):
    """Refused, and told how much of it can be used; that part is what a whole file gives."""
    options = {"movflags": "faststart"} if container == "mp4" else {}
    whole = write_video(tmp_path / f"whole.{container}", moving_square(100), container_options=options)
    cut = tmp_path / f"cut.{container}"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ValueError, match=rf"cut\.{container}: .*(written|missing).*clip=\(0, \d+\)") as caught:
        load_video(cut, 4, 16)
    last = int(str(caught.value).rsplit(" ", 1)[1].rstrip(")"))
    assert 10 < last < 90
    assert torch.equal(load_video(cut, 4, 16, clip=(0, last - 8))[0], load_video(whole, 4, 16, clip=(0, last - 8))[0])
    load_video(cut, 4, 16, clip=(0, last))
    with pytest.raises(ValueError, match="written|missing"):
        load_video(cut, 4, 16, clip=(0, last + 1))


def test_a_file_whose_index_was_cut_off(clip_file, tmp_path):
    """An mp4 whose index, at its end, is not there."""
    data = clip_file("h264.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(ValueError, match=r"cut\.mp4: (cannot be decoded|has no video stream)"):
        load_video(tmp_path / "cut.mp4", 4, 16)


@pytest.mark.filterwarnings("ignore:.*frame .* is damaged")
@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "mpeg4.avi", "h264.ts", "hevc.mp4"])
def test_damaged_files_give_frames_or_an_error_with_their_name(clip_file, tmp_path, name):
    data, rng, problems = clip_file(name).read_bytes(), random.Random(0), []
    path = tmp_path / f"damaged-{name}"
    for trial in range(25):
        damaged = bytearray(data[: rng.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(rng.choice([1, 4, 30])):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 600 if trial % 3 == 1 else len(damaged)))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            pixels, media = load_video(path, 4, 16)
        except ValueError as error:
            problems.append(str(error))
        else:
            assert pixels.isfinite().all()
            assert len(media.timestamps) == 4
            assert min(media.width, media.height) >= 1
    assert 0 < len(problems) < 25
    assert all(path.name in problem for problem in problems)


def test_frames_of_a_size_that_memory_may_not_hold(clip_file, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"h264\.mp4: has frames of 64 x 48 pixels, at most 3071"):
        load_video(clip_file("h264.mp4"), 2, 16)


def test_memory_holds_the_result_only(tmp_path):
    """2,500 of 10,000 frames, by packets and by decoding all, in less than the 69 MB that those 2,500 take."""
    bars = [np.zeros((96, 96, 3), np.uint8) for _ in range(96)]
    for i, bar in enumerate(bars):
        bar[:i] = 200
    options = {"preset": "ultrafast", "threads": "1"}
    frames = (bars[i % 96] for i in range(10_000))
    path = write_video(tmp_path / "long.mkv", frames, keyframe_every=250, codec_options=options)
    copy_video(path, tmp_path / "long.ts")
    script = """
        import resource, sys
        from llava_st.video import load_video

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        load_video(sys.argv[1], 2, 16, clip=(0, 3))
        before = peak()
        for path in sys.argv[1:]:
            pixels, media = load_video(path, 2_500, 16)
            assert media.indices[-1] == 9_999
            assert all(abs((p.mean() + 1) * 96 / 200 * 127.5 - k % 96) < 2 for p, k in zip(pixels, media.indices))
        assert peak() - before < 40, f"{before} MiB before, {peak()} MiB after"
    """
    names = [str(path), str(tmp_path / "long.ts")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *names], check=True, timeout=120)
