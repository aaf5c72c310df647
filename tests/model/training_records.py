"""Records of training data for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_st.coordinate_text import CoordinateText, to_variables, write
from llava_st.geometry import Item

Part = str | Item | CoordinateText


def make_record(*turns: str | Sequence[Part], **changes: Any) -> dict[str, Any]:
    """A record of the published format: what human and gpt say in turn, each a text or parts. About `clip.mp4`.

    `changes` replace keys; one that is None is left out.
    """
    turns = turns or ("<video>\nWhat happens?", "A square moves.")
    sides = ("input", "output")
    texts = [write([turn] if isinstance(turn, str) else turn, sides[i % 2]) for i, turn in enumerate(turns)]
    says = [{"from": ("human", "gpt")[i % 2], "value": text.text} for i, text in enumerate(texts)]
    record = {"id": "a", "video": "clip.mp4", "conversations": says, "variables": to_variables(texts), "type": "tvg"}
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """A file of records, `.jsonl` or one list; strings stand in it as they are."""
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n" if path.suffix == ".jsonl" else f"[{', '.join(texts)}]")
    return path
