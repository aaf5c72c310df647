"""Procedural ST-Align: videos of moving shapes, and questions whose answers are exact. See docs/synthesis.md."""

from __future__ import annotations

from .constant import ConstantAnswer, constant_answer
from .questions import SYNTHETIC_TASKS, event_truth, make_records, st_align_record
from .scenes import SPLITS, Scene, make_scene
from .writing import benchmarks, synthesize

__all__ = [
    "SPLITS",
    "SYNTHETIC_TASKS",
    "ConstantAnswer",
    "Scene",
    "benchmarks",
    "constant_answer",
    "event_truth",
    "make_records",
    "make_scene",
    "st_align_record",
    "synthesize",
]
