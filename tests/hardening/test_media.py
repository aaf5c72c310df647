"""Video and image files of strangers: damaged bytes, files that ask for other files, frames that grow."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llava_st import decoding
from llava_st.image import FORMATS, load_image, read_image
from llava_st.video import load_video
from PIL import Image

from tests.hardening.profiles import LONG, fuzz
from tests.model.clips import write_video

CONTAINERS = {
    "a.mp4": {}, "a.mkv": {}, "a.ts": {}, "a.h264": {}, "a.avi": {"codec": "mpeg4"}, "a.webm": {"codec": "libvpx"},
}  # fmt: skip


def picture(width: int = 32, height: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


# In a process of its own: FFmpeg is C, and what crashes there takes its process with it.
DECODE = """
import random, sys, warnings
from pathlib import Path
from llava_st.video import load_video

warnings.simplefilter("ignore")
seed, trials, folder, *names = sys.argv[1:]
rng, failures = random.Random(int(seed)), 0
for trial in range(int(trials)):
    name = names[trial % len(names)]
    data = bytearray(Path(folder, name).read_bytes())
    if trial % 3 == 0:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.choice((1, 3, 30))):
        if data:
            here = rng.randrange(min(len(data), rng.choice((64, 600, len(data)))))
            data[here : here + rng.choice((1, 1, 4))] = rng.randbytes(rng.choice((1, 1, 4, 8)))
    path = Path(folder, "damaged-" + name)
    path.write_bytes(data)
    try:
        pixels, media = load_video(path, 3, 16)
    except ValueError as error:
        failures += 1
        assert path.name in str(error), (trial, error)
    else:
        assert pixels.isfinite().all() and pixels.shape == (3, 3, 16, 16), trial
print(failures)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, options in CONTAINERS.items():
        write_video(folder / name, [picture() // (i + 1) for i in range(12)], **options)
    return folder


def test_damaged_videos_do_not_crash(clips):
    seed, trials = (random.randrange(2**31), 2000) if LONG else (0, 90)
    run = subprocess.run(
        [sys.executable, "-c", DECODE, str(seed), str(trials), str(clips), *CONTAINERS], capture_output=True, text=True
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    assert 0 < int(run.stdout) < trials


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile a.ts\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
        "v=0\nm=video 5004 RTP/AVP 96\nc=IN IP4 127.0.0.1\na=rtpmap:96 H264/90000\n",
    ],
    ids=["concat", "hls", "sdp"],
)
def test_text_does_not_make_other_files_be_read(clips, tmp_path, text):
    shutil.copy(clips / "a.ts", tmp_path / "a.ts")
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(ValueError, match=r"list\.mp4: cannot be decoded"):
        load_video(tmp_path / "list.mp4", 2, 16)


def test_a_pattern_is_no_name(tmp_path):
    for i in range(2):
        Image.fromarray(picture()).save(tmp_path / f"frame{i}.png")
    with pytest.raises((ValueError, FileNotFoundError), match=r"frame%d\.png"):
        load_video(tmp_path / "frame%d.png", 2, 16)


def test_frames_that_grow_are_refused(tmp_path, monkeypatch):
    """A raw stream may begin with small frames and go on with large ones."""
    write_video(tmp_path / "small.h264", [picture(64, 48)] * 3)
    write_video(tmp_path / "large.h264", [picture(128, 96)] * 3)
    grows = tmp_path / "grows.h264"
    grows.write_bytes((tmp_path / "small.h264").read_bytes() + (tmp_path / "large.h264").read_bytes())
    assert len(load_video(grows, 6, 16)[1].indices) == 6
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 64)
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert max(load_video(grows, 3, 16)[1].indices) < 3


@pytest.mark.parametrize("name", ["²1.png", "٣.png", "1.png", "a.png", "01a2b.png", "²³.png"])
def test_folders_of_pictures_with_any_names(tmp_path, name):
    for each in (name, "x.png", "10.png", "9.png"):
        Image.fromarray(picture()).save(tmp_path / each)
    assert len(load_video(tmp_path, 3, 16)[1].timestamps) == 3


def test_formats_that_start_programs_are_not_opened(tmp_path):
    """Pillow gives PostScript to Ghostscript, whatever the file's name."""
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_text(text)
    assert Image.open(tmp_path / "a.jpg").format == "EPS", "Pillow itself would open it"
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "a.jpg")


@fuzz(120)
@given(st.sampled_from(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")), st.data())
def test_damaged_pictures_are_pictures_or_value_errors(tmp_path_factory, kind, data):
    file = tmp_path_factory.getbasetemp() / f"picture.{kind.lower()}"
    Image.fromarray(picture()).save(file, kind)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 6))):
        here = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[here : here + 1] = data.draw(st.binary(max_size=4))
    file.write_bytes(content)
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels, media = load_image(file, 8)
        assert pixels.shape == (1, 3, 8, 8)
        assert min(media.width, media.height) >= 1


def test_the_formats_are_known_to_pillow():
    Image.init()
    assert set(FORMATS) - {"AVIF", "WEBP"} <= set(Image.OPEN)


def test_the_formats_are_known_to_ffmpeg():
    known = {name for each in av.formats_available for name in each.split(",")}
    assert set(decoding._FORMATS.split(",")) <= known


@pytest.mark.parametrize("pixel_aspect", [Fraction(2**31 - 1, 1), Fraction(1, 2**31 - 1), Fraction(0, 1)])
def test_pixels_of_absurd_shapes_have_a_size(pixel_aspect):
    _, width, height = decoding._displayed(picture(), None, pixel_aspect)
    assert width >= 1
    assert height == 24
