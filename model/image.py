"""A picture to the pixel values that the vision encoder takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from os import PathLike, fspath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .media import Media

IMAGE_SIZE = 384
# Of one picture or frame: 16,384 x 8,192. A few bytes of a file can claim more than a machine has memory for.
MAX_PIXELS = 2**27
# Pillow knows more, among them EPS, for which it starts Ghostscript. Not every Pillow knows all of these.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP")

Picture = str | PathLike[str] | Image.Image | np.ndarray | Tensor


def preprocess(frames: Sequence[np.ndarray], image_size: int = IMAGE_SIZE) -> Tensor:
    """uint8 RGB frames `[height, width, 3]` to float32 `[T, 3, image_size, image_size]` with values in `[-1, 1]`.

    Each frame is stretched to the square, neither padded nor cropped, so a coordinate stays the same fraction of the
    original width and height. Bicubic as in PIL, rounded to uint8 before scaling.
    """
    pixels = torch.empty(len(frames), 3, image_size, image_size)
    for i, frame in enumerate(frames):
        resized = Image.fromarray(frame).resize((image_size, image_size), Image.Resampling.BICUBIC)
        pixels[i] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return pixels.mul_(1 / 255).sub_(0.5).div_(0.5)


def load_image(source: Picture, image_size: int = IMAGE_SIZE) -> tuple[Tensor, Media]:
    """A picture as float32 `[1, 3, image_size, image_size]` in `[-1, 1]`, and what is known of it.

    Args:
        source: a file's name, a PIL image, or a uint8 array or tensor (`[H, W, 3]`, `[3, H, W]` or grey `[H, W]`).
        image_size: height and width of the result.

    See `read_image` for what becomes of other kinds of pictures, and for errors.
    """
    picture = read_image(source)
    height, width = picture.shape[:2]
    name = fspath(source) if isinstance(source, (str, PathLike)) else None
    return preprocess([picture], image_size), Media("image", width, height, source=name)


def read_image(source: Picture) -> np.ndarray:
    """A picture, turned as its EXIF data says, as uint8 RGB `[height, width, 3]`.

    Transparent parts show white, as on a page. Grey, palette and CMYK pictures are converted, 16 bits cut to the upper
    8. Of several pictures in a file, the first. Raises FileNotFoundError or ValueError with the file's name.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    name = fspath(source)
    try:
        with Image.open(name, formats=_formats()) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} in all are accepted")
            return _to_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error... on broken files
        raise ValueError(f"{name}: cannot be read as a picture: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    array = np.array(picture.convert("RGB"))
    if 0 in array.shape:
        raise ValueError(f"expected a picture with pixels, got {array.shape[1]} x {array.shape[0]}")
    return array


def _from_array(array: np.ndarray | Tensor) -> np.ndarray:
    values = as_uint8(array, "picture")
    # Where both readings fit, tensors have channels first and arrays last, as is the custom of each.
    first, last = values.shape[:1] == (3,), values.shape[2:] == (3,)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    elif values.ndim != 3 or not (first or last):
        raise ValueError(f"picture: expected [H, W, 3], [3, H, W] or [H, W], got {list(values.shape)}")
    elif first and (isinstance(array, Tensor) or not last):
        values = values.transpose(1, 2, 0)
    if 0 in values.shape:
        raise ValueError(f"picture: expected at least one pixel, got {list(values.shape)}")
    return np.ascontiguousarray(values)


def as_uint8(values: np.ndarray | Tensor, what: str) -> np.ndarray:
    """The array, or the tensor as one; TypeError unless it holds bytes."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if values.dtype != np.uint8:
        raise TypeError(f"{what}: expected uint8 values from 0 to 255, got {values.dtype}")
    return values
