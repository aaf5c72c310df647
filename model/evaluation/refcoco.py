"""RefCOCO, RefCOCO+ and RefCOCOg: where a thing that is described is in an image (REC)."""

from __future__ import annotations

from os import PathLike
from typing import Any

from ..geometry import Box
from ..tasks import TASKS
from ..tasks.grounding import ReferringExpression
from .records import Dataset, draw, edges, get, get_size, get_text, make_samples, read_json
from .samples import Sample

_IMAGE = "<image>"


def read_refcoco(path: str | PathLike[str], seed: int = 0) -> Dataset:
    """Samples of `"rec"`.

    The file is `{"images": [{"file_name", "width", "height", "caption"}], "annotations": [{"bbox"}]}`: annotation i is
    about image i. Boxes are `[left, top, width, height]` in pixels. A caption with `<image>` in it is a whole prompt.

    Args:
        path: the file.
        seed: of the wording of the question, drawn for each record.
    """
    content = read_json(path)
    try:
        images, annotations = (get(content, name) for name in ("images", "annotations"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not (isinstance(images, list) and isinstance(annotations, list) and len(images) == len(annotations)):
        raise ValueError(f"{path}: expected as many annotations as images, in lists")
    pairs = list(zip(images, annotations, strict=True))
    return make_samples(path, pairs, lambda index, pair: _sample(index, *pair, seed))


def _sample(index: int, image: Any, annotation: Any, seed: int) -> Sample:
    file, caption = get_text(image, "file_name"), get_text(image, "caption")
    width, height = get_size(image, "width"), get_size(image, "height")
    left, top, right, bottom = edges(get(annotation, "bbox"), "bbox")
    ids = (image.get("id"), annotation.get("image_id"))
    if None not in ids and ids[0] != ids[1]:
        raise ValueError(f"image_id: expected the annotation of image {ids[0]!r}, got that of {ids[1]!r}")
    truth = Box(left / width, top / height, right / width, bottom / height)
    if _IMAGE in caption:
        prompt = [caption.replace(_IMAGE, "").strip()]
    else:
        prompt = TASKS["rec"].prompt(event=caption, wording=draw(seed, index, len(ReferringExpression.wordings)))
    return Sample(index, f"{file}#{index}", "rec", file, tuple(prompt), truth)
