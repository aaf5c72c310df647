"""A LLaVA-ST trained from nothing on moving shapes. See docs/reproduction.md."""

from pathlib import Path

# A model that `make reproduce` trained, in half precision.
CHECKPOINT = Path(__file__).parent / "checkpoint"
