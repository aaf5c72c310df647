"""The ST-Align benchmark: spatio-temporal grounding (STVG), spatial grounding (SVG), and localizing and captioning an
event (ELC)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from string import whitespace
from typing import Any

from ..geometry import Box, Instant, Item, TimeSpan
from ..tasks import TASKS
from ..tasks.st_align import SPAN_WORDINGS
from ..video import sample_frame_indices
from .metrics import EventTruth, TubeTruth
from .records import Dataset, draw, edges, get, get_size, get_text, make_samples, number, numbers, read_list
from .samples import Sample

# How many records of a file the published evaluation uses: the first ones.
PUBLISHED_LIMIT = 2000

_TUBE = "<bboxes>"
_DIGITS = 3  # of positions in prompts
# Of truths whose media cannot be read; otherwise it is the number of frames that were shown.
_FRAMES = 100
_END = re.compile("<e>", re.IGNORECASE)
_TUBE_BEGINS = re.compile(_TUBE, re.IGNORECASE)
_ANNOUNCEMENT = re.compile(r"Object bounding box:?\Z", re.IGNORECASE)
# What the prompts of the tasks are filled in by, and no item can be.
_FIELDS = ("self", "question", "wording")


def read_st_align(path: str | PathLike[str], task: str, seed: int = 0) -> Dataset:
    """Samples of `"stvg"`, `"svg"` or `"elc"`.

    The file is a list of records `{"video_path", "meta": {"width", "height", "split": [first, last], "spatial_token",
    "time_token"}, "conversations": [question, answer]}`. `split` is in frames, both included. `time_token` gives the
    frames of `<s>` and `<e>`; `spatial_token` the tube `<bboxes>` as `{frame: box}` and the boxes that the question
    names. Boxes are `[left, top, width, height]` in pixels. Positions in questions are fractions of three digits.

    Args:
        path: the file.
        task: which of the three.
        seed: of the phrase that stands for "From <s> to <e>", drawn for each record.
    """
    return make_samples(path, read_list(path), lambda index, record: _sample(index, record, task, seed))


def _sample(index: int, record: Any, task: str, seed: int) -> Sample:
    video = get_text(record, "video_path")
    width, height = get_size(record, "meta.width"), get_size(record, "meta.height")
    clip = _clip(record)
    question, answer = _turns(record)
    tokens = get(record, "meta.spatial_token")
    times = _times(record, clip)
    span = _span(times)
    tube = TubeTruth(_boxes(tokens, clip), sample_frame_indices(clip, _FRAMES), width, height)

    items: dict[str, Item] = {name: Instant(round(time, _DIGITS)) for name, time in times.items()}
    for name, value in tokens.items():
        if name != _TUBE and _placeholder(name) in question:
            items[name] = _box_in_prompt(value, name, width, height)
    prompt = _prompt(task, question, items, draw(seed, index, len(SPAN_WORDINGS)))
    truth = tube if task == "svg" else EventTruth(span, tube, _caption(answer) if task == "elc" else "")
    return Sample(index, f"{video}#{index}", task, video, prompt, truth, clip)


def _clip(record: Any) -> tuple[int, int]:
    first, last = numbers(get(record, "meta.split"), "meta.split", 2)
    if not (0 <= first <= last and first == int(first) and last == int(last)):
        raise ValueError(f"meta.split: expected the first and the last frame, got [{first}, {last}]")
    return int(first), int(last)


def _turns(record: Any) -> tuple[str, str]:
    turns = get(record, "conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError(f"conversations: expected a question and an answer, got {turns!r}")
    texts = [turn.get("value") if isinstance(turn, dict) else turn for turn in turns[:2]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"conversations: expected texts, got {turns[:2]!r}")
    return texts[0], texts[1]


def _times(record: Any, clip: tuple[int, int]) -> dict[str, float]:
    """Fractions of the clip by name."""
    tokens = get(record, "meta.time_token")
    if not isinstance(tokens, dict):
        raise ValueError(f"meta.time_token: expected frames by name, got {tokens!r}")
    first, last = clip
    times = {}
    for name, value in tokens.items():
        frame = number(value, f"meta.time_token.{name}")
        # Some annotations end at the first frame behind the event, which may be behind the clip.
        if not first <= frame <= last + 1:
            raise ValueError(f"meta.time_token.{name}: expected a frame of the clip, {first} to {last}, got {frame!r}")
        times[name] = min((frame - first) / max(last - first, 1), 1.0)
    return times


def _span(times: Mapping[str, float]) -> TimeSpan:
    for name in ("<s>", "<e>"):
        if name not in times:
            raise ValueError(f"meta.time_token: expected {name}, found {sorted(times)}")
    if times["<s>"] > times["<e>"]:
        raise ValueError("meta.time_token: expected <s> before <e>")
    return TimeSpan(times["<s>"], times["<e>"])


def _boxes(tokens: Any, clip: tuple[int, int]) -> dict[int, Box]:
    """The tube: pixels by frame."""
    if not isinstance(tokens, dict) or not isinstance(tokens.get(_TUBE), dict):
        raise ValueError(f"meta.spatial_token: expected {_TUBE} with boxes by frame, found none")
    boxes = {}
    for frame, box in tokens[_TUBE].items():
        if not frame.isdecimal():
            raise ValueError(f"meta.spatial_token.{_TUBE}: expected frames for keys, got {frame!r}")
        boxes[int(frame)] = Box(*edges(box, f"meta.spatial_token.{_TUBE}.{frame}"))
    if not any(clip[0] <= frame <= clip[1] for frame in boxes):
        raise ValueError(f"meta.spatial_token.{_TUBE}: expected boxes in the clip, found none")
    return boxes


def _box_in_prompt(value: Any, name: str, width: float, height: float) -> Box:
    left, top, right, bottom = edges(value, f"meta.spatial_token.{name}")
    fractions = (left / width, top / height, right / width, bottom / height)
    return Box(*(round(min(max(x, 0.0), 1.0), _DIGITS) for x in fractions))


def _placeholder(name: str) -> str:
    """Where a question has the item of a name; the name may come with its brackets."""
    return f"<{name.strip('<>')}>"


def _prompt(task: str, question: str, items: Mapping[str, Item], wording: int) -> tuple[str | Item, ...]:
    found = {}
    for name, item in items.items():
        place = _placeholder(name)
        if place in question:
            # The layout of a box has its brackets already.
            question = re.sub(rf"\[\s*{re.escape(place)}\s*\]", lambda _, place=place: place, question)
            if place[1:-1] in _FIELDS:
                raise ValueError(f"meta: expected items of other names than {', '.join(_FIELDS)}, got {name!r}")
            found[place[1:-1]] = item
    wordings = {} if task == "stvg" else {"wording": wording}
    return tuple(TASKS[task].prompt(question, **wordings, **found))


def _caption(answer: str) -> str:
    _, *rest = _END.split(answer, 1)
    text = _TUBE_BEGINS.split(rest[0], 1)[0].rstrip(f"{{{whitespace}") if rest else ""
    caption = _ANNOUNCEMENT.sub("", text).rstrip(f".{whitespace}").lstrip(f",{whitespace}")
    if not caption:
        raise ValueError(f"conversations: expected the answer 'Ends in <e>, CAPTION. ... {_TUBE}', got {answer!r}")
    return caption
