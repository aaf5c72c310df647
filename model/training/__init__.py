"""Training of LLaVA-ST in stages, see docs/training.md."""
