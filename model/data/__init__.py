"""Training data: records of ST-Align's format, as conversations and as batches. See docs/data.md."""
