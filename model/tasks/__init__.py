"""LLaVA-ST's tasks: how each is asked, answered and read. docs/tasks.md lists them."""

from __future__ import annotations

from .base import AnswerError, Part, Task
from .events import DenseCaptioning, EventLocalization
from .free_text import (
    Captioning,
    Classification,
    Conversation,
    QuestionAnswering,
    RegionCaptioning,
    TemporalReferring,
)
from .grounded_text import DenseGroundedCaptioning, ImageGroundedConversation, TemporalGroundedConversation
from .grounding import ReferringExpression, SpatialGrounding, SpatioTemporalGrounding, TemporalGrounding
from .values import CaptionedSpan, Event, GroundedText, SpatioTemporal, map_items

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SpatioTemporalGrounding(),
        SpatialGrounding(),
        EventLocalization(),
        TemporalGrounding(),
        TemporalReferring(),
        ReferringExpression(),
        RegionCaptioning(),
        DenseGroundedCaptioning(),
        DenseCaptioning(),
        Captioning(),
        QuestionAnswering(),
        TemporalGroundedConversation(),
        ImageGroundedConversation(),
        Conversation(),
        Classification(),
    )
}

__all__ = [
    "TASKS",
    "AnswerError",
    "CaptionedSpan",
    "Event",
    "GroundedText",
    "Part",
    "SpatioTemporal",
    "Task",
    "map_items",
]
