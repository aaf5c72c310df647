"""Pictures of every kind to pixels and Media."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llava_st import image as image_module
from llava_st.image import load_image, preprocess, read_image
from PIL import Image

COLOURS = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[10, 20, 30], [90, 90, 90], [255, 255, 255]]], np.uint8)


def test_a_file_an_object_and_arrays_give_the_same(tmp_path):
    path = tmp_path / "colours.png"
    Image.fromarray(COLOURS).save(path)
    expected = preprocess([COLOURS], 16)
    tensor = torch.from_numpy(COLOURS)
    for source in (path, str(path), Image.open(path), COLOURS, tensor, tensor.permute(2, 0, 1)):
        pixels, media = load_image(source, 16)
        assert torch.equal(pixels, expected)
        assert (media.kind, media.width, media.height, media.timestamps, media.indices) == ("image", 3, 2, (0.0,), ())
    assert load_image(path)[0].shape == (1, 3, 384, 384)
    assert load_image(path, 16)[1].source == str(path)
    assert media.source is None


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "PA"])
def test_other_kinds_of_pictures_are_converted(mode):
    """White, black and a grey, exact in each mode (the grey where there is one)."""
    grey = np.array([[0, 255, 0 if mode == "1" else 102]], np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).convert(mode)
    np.testing.assert_array_equal(read_image(picture), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bits_are_read_from_files(tmp_path):
    Image.fromarray(np.array([[0, 40_000, 65_535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 156, 255]


def test_transparent_parts_are_white(tmp_path):
    picture = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8))
    picture.save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")[0]
    assert read[0].tolist() == [200, 0, 0]
    assert read[1].tolist() == [255, 255, 255]
    assert np.abs(read[2].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert read_image(palette).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_they_were_taken(tmp_path, orientation):
    """The eight orientations of EXIF, each undone by what its definition says of the first row and column."""
    upright = COLOURS
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), upright)
    assert load_image(tmp_path / "photo.png", 16)[1].width == 3


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"expected \[H, W, 3\], .* got \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "uint8.* float32"),
        (Image.new("RGB", (0, 3)), ValueError, "0 x 3"),
    ],
)
def test_arrays_that_are_no_pictures(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source, 16)


def test_grey_arrays_and_single_pixels():
    assert (load_image(np.full((1, 1), 255, np.uint8), 16)[0] == 1).all()
    pixels, media = load_image(np.zeros((5, 2), np.uint8), 16)
    assert (pixels == -1).all()
    assert (media.width, media.height) == (2, 5)


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png: no such picture"):
        load_image(tmp_path / "missing.png")
    (tmp_path / "noise.png").write_bytes(b"no picture" * 100)
    with pytest.raises(ValueError, match=r"noise\.png: cannot be read as a picture"):
        load_image(tmp_path / "noise.png")
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as a picture"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        load_image(tmp_path)


def test_a_few_bytes_that_claim_a_huge_picture(tmp_path):
    """Its header says 60,000 x 60,000 pixels, 10 GB: refused before any is allocated."""
    path = tmp_path / "bomb.ppm"
    path.write_bytes(b"P6 60000 60000 255\n")
    with pytest.raises(ValueError, match=r"bomb\.ppm: .*3600000000 pixels"):
        load_image(path)


def test_the_own_limit_of_pixels(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "colours.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 5)
    with pytest.raises(ValueError, match=r"colours\.png: .*3 x 2 pixels, at most 5"):
        load_image(tmp_path / "colours.png")
