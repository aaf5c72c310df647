"""Data sets of synthetic clips on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from .questions import (
    Record,
    charades_record,
    check_tasks,
    image_file,
    make_records,
    refcoco_pair,
    st_align_record,
    still_frame,
    video_file,
)
from .rendering import render, write_video
from .scenes import SPLITS, Scene, make_scene

_SETTINGS = "settings.json"
# Of the pictures. A change here, in scenes or in rendering makes other files for the same seed.
_VERSION = 2


def synthesize(
    out: str | PathLike[str],
    clips: int,
    seed: int = 0,
    split: str = "train",
    tasks: Iterable[str] | None = None,
    size: int = 96,
    frames: int = 20,
    objects: tuple[int, int] | None = None,
    questions_per_clip: int = 8,
    turns: int = 4,
    longest_tube: int | None = None,
    mixed: bool = False,
    name: str | None = None,
) -> Path:
    """Renders clips and asks about them; the YAML of the data set, which is written last.

    Makes `videos/*.mp4` and `images/*.png`, a frame of each, `NAME.jsonl` and `NAME.yaml` with records of training
    data, and, but for the split `"train"`, `benchmark/{stvg,svg,elc,tvg,rec}.json` about one object of each clip.

    Clip i depends on seed, split and i alone. Every file appears when it is whole: a run that was cut off goes on, more
    clips add to those that are there, and other questions (`tasks`, ...) under another `name` share the clips.

    Args:
        out: a folder for one split of one seed.
        clips: how many.
        seed: what is random derives from it.
        split: `"train"`, `"validation"` or `"held-out"`, see `make_scene`.
        tasks: some of `SYNTHETIC_TASKS`; by default all.
        size: height and width of the pictures in pixels, even.
        frames: of a clip.
        objects: the least and the largest number of objects, see `make_scene`.
        questions_per_clip: see `make_records`, as are the next two.
        turns: the most questions in a record.
        longest_tube: the most frames in the span that an SVG question gives.
        mixed: turns of a record are of several tasks.
        name: of the files of records; by default that of the split.

    Returns:
        The YAML.

    Raises:
        ValueError: the folder holds clips of another seed, split or size, or an argument is out of range.
    """
    if clips < 1 or questions_per_clip < 1 or turns < 1:
        raise ValueError(
            f"clips, questions_per_clip, turns: expected 1 at least, got {clips}, {questions_per_clip} and {turns}"
        )
    if longest_tube is not None and longest_tube < 1:
        raise ValueError(f"longest_tube: expected 1 at least, got {longest_tube}")
    if size < 16 or size % 2:
        raise ValueError(f"size: expected an even number from 16, got {size}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    tasks, name = check_tasks(tasks), name or split
    make = partial(make_scene, seed, split, frames=frames, objects=objects)
    make(0)  # its arguments are checked before anything is written
    folder = Path(out)
    for each in ("videos", "images"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    settings = {"version": _VERSION, "seed": seed, "split": split, "size": size, "frames": frames, "objects": objects}
    _check_settings(folder / _SETTINGS, settings)

    for clip in range(clips):
        _render(make(clip), folder, size)
    with _whole(folder / f"{name}.jsonl") as partial_file, open(partial_file, "w", encoding="utf-8") as file:
        for clip in range(clips):
            for record in make_records(make(clip), tasks, questions_per_clip, turns, longest_tube, mixed):
                file.write(json.dumps(record) + "\n")
    if split != "train":
        _write_benchmarks(folder / "benchmark", map(make, range(clips)), size)
    yaml = folder / f"{name}.yaml"
    with _whole(yaml) as partial_file:
        partial_file.write_text(f"datasets:\n  - json_path: {name}.jsonl\n    data_folder: .\n    source: synthetic\n")
    return yaml


def benchmarks(scenes: Iterable[Scene], size: int, asked: Callable[[Scene], int] | None = None) -> dict[str, Any]:
    """What the files of the benchmarks hold, by the name of the task.

    Args:
        scenes: clips.
        size: of the pictures, in pixels.
        asked: gives the index of the object to ask about; by default the scene's `asked`. Image questions are always
            about that one: another need not be in the image.
    """
    found: dict[str, Any] = {"stvg": [], "svg": [], "elc": [], "tvg": [], "rec": {"images": [], "annotations": []}}
    for scene in scenes:
        index = asked(scene) if asked else scene.asked
        for task in ("stvg", "svg", "elc"):
            found[task].append(st_align_record(scene, index, task, size))
        found["tvg"].append(charades_record(scene, index))
        image, annotation = refcoco_pair(scene, scene.asked, size)
        found["rec"]["images"].append(image)
        found["rec"]["annotations"].append(annotation)
    return found


def _write_benchmarks(folder: Path, scenes: Iterable[Scene], size: int) -> None:
    folder.mkdir(exist_ok=True)
    for task, content in benchmarks(scenes, size).items():
        with _whole(folder / f"{task}.json") as partial_file:
            partial_file.write_text(json.dumps(content), encoding="utf-8")


def _check_settings(path: Path, settings: Record) -> None:
    """Clips of two data sets in one folder would be mistaken for each other."""
    wanted = json.dumps(settings)
    if path.exists():
        if (found := path.read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"out: {path.parent} holds other clips: {found}; expected {wanted}")
        return
    with _whole(path) as partial_file:
        partial_file.write_text(wanted, encoding="utf-8")


def _render(scene: Scene, folder: Path, size: int) -> None:
    """The video and the image of a clip, unless they are there."""
    video, image = folder / video_file(scene), folder / image_file(scene)
    if video.exists() and image.exists():
        return
    pictures = render(scene, size)
    with _whole(video) as partial_file:
        write_video(partial_file, pictures)
    with _whole(image) as partial_file:
        Image.fromarray(pictures[still_frame(scene)]).save(partial_file, format="png")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes the right one when all is written."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
