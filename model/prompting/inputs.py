"""What the model takes: conversations as tensors, side by side or one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ..media import Media
from .content import Shown

IGNORED = -100
Row = Mapping[str, Tensor]


class LlavaStInputs(BatchFeature):
    """What the model takes.

    Attributes:
        media: of each conversation, its videos and images in reading order.
    """

    def __init__(
        self, data: dict[str, Any] | None = None, media: Sequence[Sequence[Media]] = (), **kwargs: Any
    ) -> None:
        super().__init__(data, **kwargs)
        self.media = [list(each) for each in media]

    def to(self, *args: Any, **kwargs: Any) -> LlavaStInputs:
        """As `Tensor.to`, in place. Positions go to the device, but keep their dtype."""
        positions = self.data.get("positions")
        if positions is not None:
            self.data["positions"] = positions.view(torch.int64)  # integers are moved as they are
        super().to(*args, **kwargs)
        if positions is not None:
            self.data["positions"] = self.data["positions"].view(torch.float64)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "media": self.media}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.media = state["media"]


def pad(rows: Sequence[Row], pad_id: int, side: str) -> dict[str, Tensor]:
    """Rows of `input_ids`, `positions` and perhaps `labels` as `[B, L]`, with an `attention_mask`."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {side!r}")
    fills = {"input_ids": pad_id, "attention_mask": 0, "positions": math.nan, "labels": IGNORED}
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill, padding_side=side)
        for name, fill in fills.items()
        if name in rows[0]
    }


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The rows as one, `[1, N]`, with `position_ids` that begin anew and the number of the `sample`."""
    lengths = [len(row["input_ids"]) for row in rows]
    data = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}
    data["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    data["sample"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))[None]
    if "labels" in data:
        # No token of the same sample comes before its first.
        data["labels"] = data["labels"].masked_fill(data["position_ids"] == 0, IGNORED)
    return data


def pictures(shown: Sequence[Shown]) -> dict[str, Tensor]:
    """`pixel_values` of images, `pixel_values_videos` and `video_frames` of videos; nothing where all are encoded."""
    encoded = [each.pixels is None for each in shown]
    if any(encoded):
        if not all(encoded):
            raise ValueError("content: expected no video and image to be encoded already, or all; got some")
        return {}
    data: dict[str, Tensor] = {}
    if images := [each.pixels for each in shown if each.media.kind == "image"]:
        data["pixel_values"] = torch.cat(images)
    if videos := [each.pixels for each in shown if each.media.kind == "video"]:
        data["pixel_values_videos"] = torch.cat(videos)
        data["video_frames"] = torch.tensor([len(pixels) for pixels in videos])
    return data
