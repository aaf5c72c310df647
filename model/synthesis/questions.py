"""Questions about scenes, and their right answers, as records of training data and of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ..coordinate_text import to_variables, write
from ..evaluation.metrics import EventTruth, TubeTruth
from ..geometry import Instant
from ..tasks import TASKS, Event, Part, SpatioTemporal
from ..tasks.grounding import ReferringExpression
from ..tasks.st_align import OBJECT, SPAN_WORDINGS
from .scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, TRAINING_PAIRS, MovingShape, Scene

Record = dict[str, Any]
Turn = tuple[list[Part], list[Part]]  # a question without the video or image, and its answer
_Value = TypeVar("_Value")

STVG_QUESTION = "When and where does the {} move?"
SVG_QUESTION = "From <s> to <e>, where is the {}?"
ELC_QUESTION = "Starts in <s>, what event is the object/subject in the region <box> associated with?"

# Purposes of random numbers, see `scenes.generator`.
_STILL, _QUESTIONS = 2, 3
MIXED = "mixed"  # type of a record whose turns are of several tasks


def video_file(scene: Scene) -> str:
    """Of a scene, in the folder of a data set."""
    return f"videos/{scene.name}.mp4"


def image_file(scene: Scene) -> str:
    """Of a scene's `still_frame`, in the folder of a data set."""
    return f"images/{scene.name}.png"


def still_frame(scene: Scene) -> int:
    """The frame that questions about an image ask about: one with as many objects as there are beside the asked one."""
    frames = [frame for frame in range(scene.frames) if scene.objects[scene.asked].visible(frame)]
    counts = [sum(shape.visible(frame) for shape in scene.objects) for frame in frames]
    best = [frame for frame, count in zip(frames, counts, strict=True) if count == max(counts)]
    return best[int(scene.random(_STILL).integers(len(best)))]


def make_records(
    scene: Scene,
    tasks: Iterable[str] | None = None,
    questions: int = 8,
    turns: int = 4,
    longest_tube: int | None = None,
    mixed: bool = False,
) -> list[Record]:
    """Records of training data about a scene, in the published format.

    Each is a conversation about one task, whose turns ask about different objects, so that no answer can be copied from
    an earlier one. Which tasks and objects come is random.

    With `mixed` a conversation has turns of all tasks about the video, or about the image, and is of the type
    `"mixed"`: one video then serves many questions, some of which earlier answers help with.

    Args:
        scene: the clip.
        tasks: some of `SYNTHETIC_TASKS`; by default all. One that is named twice asks about each object twice.
        questions: the most questions about it; fewer where there are no more.
        turns: the most questions in a record.
        longest_tube: the most frames in the span that an SVG question gives, which is then a part of the time that the
            object is there; by default it is all of it.
    """
    rng = scene.random(_QUESTIONS)
    asked: dict[tuple[str, str], list[Turn]] = {}
    for task in check_tasks(tasks):
        found = _svg(scene, rng, longest_tube) if task == "svg" else _TURNS[task](scene, rng)
        kind = TASKS[task].media
        asked.setdefault((MIXED if mixed else task, kind), []).extend(found)
    parts = []
    for (task, kind), each in asked.items():
        shuffled = _shuffled(rng, each)
        parts += [(task, kind, shuffled[i : i + turns]) for i in range(0, len(shuffled), turns)]
    records: list[Record] = []
    for task, kind, conversation in _shuffled(rng, parts):
        conversation = conversation[:questions]
        questions -= len(conversation)
        if conversation:
            records.append(_record(scene, task, kind, len(records), conversation))
    return records


def check_tasks(tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The tasks, by default all of `SYNTHETIC_TASKS`; ValueError where one is unknown or there are none."""
    found = SYNTHETIC_TASKS if tasks is None else tuple(tasks)
    if not found or not set(found) <= set(SYNTHETIC_TASKS):
        raise ValueError(f"tasks: expected some of {', '.join(SYNTHETIC_TASKS)}, got {', '.join(found) or 'none'}")
    return found


def event_truth(scene: Scene, index: int) -> EventTruth:
    """When and where an object is, as metrics take it; pixels are parts of the picture."""
    shape = scene.objects[index]
    boxes = {frame: shape.box(frame) for frame in range(shape.first, shape.last + 1)}
    tube = TubeTruth(boxes, range(scene.frames), width=1, height=1)
    return EventTruth(scene.span(index), tube, describe(shape))


def st_align_record(scene: Scene, index: int, task: str, size: int) -> Record:
    """A record of the ST-Align benchmark about an object.

    Args:
        scene: the clip.
        index: of the object.
        task: `"stvg"`, `"svg"` or `"elc"`.
        size: of the pictures, in pixels.
    """
    shape = scene.objects[index]
    boxes = {str(frame): _in_pixels(shape, frame, size) for frame in range(shape.first, shape.last + 1)}
    spatial: dict[str, Any] = {"<bboxes>": boxes}
    if task == "stvg":
        question, answer = STVG_QUESTION.format(shape.name), f"{{<s>,<e>}} {OBJECT} {{<bboxes>}}"
    elif task == "svg":
        question, answer = SVG_QUESTION.format(shape.name), f"{OBJECT} {{<bboxes>}}"
    elif task == "elc":
        question, answer = ELC_QUESTION, f"Ends in <e>, {describe(shape)}. {OBJECT} {{<bboxes>}}"
        spatial["<box>"] = boxes[str(shape.first)]
    else:
        raise ValueError(f"task: expected stvg, svg or elc, got {task!r}")
    return {
        "id": f"{scene.name}-{task}",
        "video_path": video_file(scene),
        "meta": {
            "width": size,
            "height": size,
            "split": [0, scene.frames - 1],
            "spatial_token": spatial,
            "time_token": {"<s>": shape.first, "<e>": shape.last},
        },
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def charades_record(scene: Scene, index: int) -> Record:
    """A record of Charades-STA's form (TVG) about an object."""
    span = scene.span(index)
    return {
        "image_id": video_file(scene),
        "caption": describe(scene.objects[index]),
        "timestamp": [span.start, span.end],
    }


def refcoco_pair(scene: Scene, index: int, size: int) -> tuple[Record, Record]:
    """An image and an annotation of RefCOCO's form (REC) about an object in the still frame."""
    shape = scene.objects[index]
    image = {"id": scene.clip, "file_name": image_file(scene), "width": size, "height": size}
    box = _in_pixels(shape, still_frame(scene), size)
    return {**image, "caption": f"the {shape.name}"}, {"image_id": scene.clip, "bbox": box}


def describe(shape: MovingShape) -> str:
    """What happens: `a red circle moves left`."""
    return f"{_with_article(shape.name)} moves {shape.direction}"


def _stvg(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    task = TASKS["stvg"]
    for i, shape in enumerate(scene.objects):
        answer = SpatioTemporal(scene.span(i), scene.tube(i))
        yield task.prompt(STVG_QUESTION.format(shape.name)), task.answer(answer)


def _svg(scene: Scene, rng: np.random.Generator, longest: int | None = None) -> Iterator[Turn]:
    task = TASKS["svg"]
    for i, shape in enumerate(scene.objects):
        count = min(shape.last - shape.first + 1, longest or scene.frames)
        first = int(rng.integers(shape.first, shape.last - count + 2))
        tube = scene.tube(i, first, first + count - 1)
        ends = {"s": Instant(tube.span.start), "e": Instant(tube.span.end)}
        wording = int(rng.integers(len(SPAN_WORDINGS)))
        yield task.prompt(SVG_QUESTION.format(shape.name), wording=wording, **ends), task.answer(tube)


def _elc(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    task = TASKS["elc"]
    for i, shape in enumerate(scene.objects):
        span = scene.span(i)
        prompt = task.prompt(ELC_QUESTION, s=Instant(span.start), box=shape.box(shape.first))
        yield prompt, task.answer(Event(Instant(span.end), describe(shape), scene.tube(i)))


def _tvg(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    task = TASKS["tvg"]
    for i, shape in enumerate(scene.objects):
        yield task.prompt(describe(shape)), task.answer(scene.span(i))


def _tr(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    """About spans that are those of one object."""
    task = TASKS["tr"]
    spans = [scene.span(i) for i in range(len(scene.objects))]
    for shape, span in zip(scene.objects, spans, strict=True):
        if spans.count(span) == 1:
            yield task.prompt(span), task.answer(describe(shape))


def _rec(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    task, frame = TASKS["rec"], still_frame(scene)
    for shape in scene.objects:
        if shape.visible(frame):
            wording = int(rng.integers(len(ReferringExpression.wordings)))
            yield task.prompt(f"the {shape.name}", wording=wording), task.answer(shape.box(frame))


def _reg(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    task, frame = TASKS["reg"], still_frame(scene)
    for shape in scene.objects:
        if shape.visible(frame):
            yield task.prompt(shape.box(frame)), task.answer(_with_article(shape.name))


def _captioning(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    """A sentence for each object, in the order in which they appear."""
    task = TASKS["captioning"]
    shapes = sorted(scene.objects, key=lambda shape: (shape.first, shape.last, shape.name))
    sentences = (f"{describe(shape).capitalize()}." for shape in shapes)
    yield task.prompt(), task.answer(" ".join(sentences))


def _qa(scene: Scene, rng: np.random.Generator) -> Iterator[Turn]:
    """As many as there are objects."""
    task = TASKS["qa"]
    for question, answer in _shuffled(rng, list(_short_questions(scene, rng)))[: len(scene.objects)]:
        yield task.prompt(question), task.answer(answer)


def _short_questions(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """All whose answer is a word or two and beyond doubt."""
    shapes = [shape.shape for shape in scene.objects]
    colours = [shape.colour for shape in scene.objects]
    for shape in scene.objects:
        if shapes.count(shape.shape) == 1:
            yield f"What colour is the {shape.shape}?", shape.colour
        if colours.count(shape.colour) == 1:
            yield f"What shape is the {shape.colour} object?", shape.shape
        yield f"In which direction does the {shape.name} move?", shape.direction
    yield "How many objects are in the video?", str(len(scene.objects))
    colour = _draw(rng, COLOURS if rng.random() < 0.5 else colours)
    yield f"How many {colour} objects are in the video?", str(colours.count(colour))
    shape_name = _draw(rng, SHAPES if rng.random() < 0.5 else shapes)
    yield f"How many {_plural(shape_name)} are in the video?", str(shapes.count(shape_name))
    pairs = HELD_OUT_PAIRS if scene.split == "held-out" else TRAINING_PAIRS
    names = [shape.name for shape in scene.objects]
    absent = [name for shape, colour in pairs if (name := f"{colour} {shape}") not in names]
    name, answer = (_draw(rng, names), "yes") if rng.random() < 0.5 else (_draw(rng, absent), "no")
    yield f"Is there {_with_article(name)} in the video?", answer
    if len(scene.objects) > 1:
        one, other = _shuffled(rng, list(scene.objects))[:2]
        if one.first != other.first:
            earlier = min(one, other, key=lambda shape: shape.first)
            yield f"Which appears first, the {one.name} or the {other.name}?", f"the {earlier.name}"


_TURNS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Turn]]] = {
    "stvg": _stvg,
    "svg": _svg,
    "elc": _elc,
    "tvg": _tvg,
    "tr": _tr,
    "rec": _rec,
    "reg": _reg,
    "captioning": _captioning,
    "qa": _qa,
}
SYNTHETIC_TASKS = tuple(_TURNS)


def _record(scene: Scene, task: str, kind: str, number: int, conversation: Sequence[Turn]) -> Record:
    texts = []
    for question, answer in conversation:
        shown = [] if texts else [f"<{kind}>\n"]
        texts += [write([*shown, *question], "input"), write(answer, "output")]
    record: Record = {"id": f"{scene.name}-{number}", kind: video_file(scene) if kind == "video" else image_file(scene)}
    record["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text.text} for i, text in enumerate(texts)]
    record["variables"] = to_variables(texts)
    if kind == "video":
        record["meta"] = {"split": [0, scene.frames - 1]}
    return {**record, "type": task}


def _in_pixels(shape: MovingShape, frame: int, size: int) -> list[float]:
    """Left, top, width and height."""
    box = shape.box(frame)
    return [box.left * size, box.top * size, shape.width * size, shape.height * size]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(shape: str) -> str:
    return f"{shape}{'es' if shape.endswith('s') else 's'}"


def _draw(rng: np.random.Generator, options: Sequence[_Value]) -> _Value:
    return options[int(rng.integers(len(options)))]


def _shuffled(rng: np.random.Generator, values: Sequence[_Value]) -> list[_Value]:
    return [values[i] for i in np.argsort(rng.random(len(values)))]
