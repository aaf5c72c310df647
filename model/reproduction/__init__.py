"""A LLaVA-ST trained from nothing on moving shapes. See docs/reproduction.md."""

from pathlib import Path

# What `benchmarks.reproduce` trained.
CHECKPOINT = Path(__file__).parent / "checkpoint"
