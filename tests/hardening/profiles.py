"""How many examples the fuzz tests try: the same few in every run, or `HYPOTHESIS_PROFILE=long`, new ones each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def fuzz(examples: int) -> settings:
    """Settings for a test that tries so many examples in the short profile, and twenty times as many in the long."""
    return settings(
        max_examples=examples * (20 if LONG else 1),
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
