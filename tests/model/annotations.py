"""Small data files in the layouts of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = {
    "stvg": "<video>\nAt which time does the man ride the bike?",
    "svg": "<video>\nFrom <s> to <e>, where is the man?",
    "elc": "<video>\nStarts in <s>, what event is the subject in the region <bbox> associated with?",
}
ANSWERS = {
    "stvg": "{<s>,<e>} <bboxes>",
    "svg": "<bboxes>",
    "elc": "Ends in <e>, a man, in a hat, rides a bike. Object bounding box: <bboxes>",
}


def st_align_record(task: str, video: str = "a.mkv", **meta: Any) -> dict[str, Any]:
    """Frames 10 to 30 of a video of 64 x 48 pixels; something happens from 15 to 25, where a square moves right."""
    tube = {str(frame): [frame, 12, 16, 12] for frame in range(15, 26)}
    return {
        "video_path": video,
        "meta": {
            "width": 64,
            "height": 48,
            "split": [10, 30],
            "spatial_token": {"<bboxes>": tube, "<bbox>": [15, 12, 16, 12]},
            "time_token": {"<s>": 15, "<e>": 25},
            **meta,
        },
        "conversations": [{"from": "human", "value": QUESTIONS[task]}, {"from": "gpt", "value": ANSWERS[task]}],
    }


def refcoco_content(count: int = 2) -> dict[str, Any]:
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 80, "height": 40, "caption": f"the dog {i}"} for i in range(count)
    ]
    return {"images": images, "annotations": [{"id": i, "bbox": [20, 10, 40 + i, 20]} for i in range(count)]}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path
