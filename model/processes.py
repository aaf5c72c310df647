"""The processes that torchrun or accelerate started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def patient_processes() -> PartialState:
    """This process among the others. Where one has work of hours to do, the rest wait, up to a week: by default they
    would give up after minutes."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
