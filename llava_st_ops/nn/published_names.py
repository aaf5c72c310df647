"""The names that parameters have in LLaVA-ST's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Gives the entries below `prefix` whose names begin with a key of `names` their new beginnings, in place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        for old, new in names.items():
            if rest.startswith(old):
                state_dict[prefix + new + rest[len(old) :]] = state_dict.pop(key)
                break
