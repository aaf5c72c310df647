"""Scoring LLaVA-ST on benchmarks."""
