"""Checkpoints in other layouts: the published one of LLaVA-ST, and plain language models."""
