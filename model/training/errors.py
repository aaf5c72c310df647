"""What ends a training."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite."""
