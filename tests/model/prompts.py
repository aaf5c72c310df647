"""Inputs of the tiny model, written by hand: without the processor, so that the model is tested by itself."""

from __future__ import annotations

import math

import torch
from llava_st.configuration_llava_st import LlavaStConfig

NAN = math.nan


def image_block(config: LlavaStConfig) -> list[int]:
    rows, columns = config.image_grid()
    ids = config.token_ids
    return [ids["im_start"], *[ids["im_patch"]] * (rows * columns - 2), ids["im_end"]]


def video_block(config: LlavaStConfig, frames: int) -> list[int]:
    fast, slow = map(math.prod, config.video_grids(frames))
    ids = config.token_ids
    patch = ids["vid_patch"]
    return [
        *(ids["vid_start"], *[patch] * (fast - 2), ids["vid_end"]),
        *(ids["slow_vid_start"], *[patch] * (slow - 2), ids["slow_vid_end"]),
    ]


def sample(config: LlavaStConfig, *parts: str | int | tuple, seed: int = 0) -> dict:
    """One sample: `"image"`, `("video", frames)`, `("temporal_input", position)`, or the id of a word."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision_config.image_size
    ids: list[int] = []
    positions: list[float] = []
    images, videos, frames = [], [], []
    for part in parts:
        if part == "image":
            added = image_block(config)
            images.append(torch.randn(1, 3, size, size, generator=generator))
        elif isinstance(part, tuple) and part[0] == "video":
            added = video_block(config, part[1])
            frames.append(part[1])
            videos.append(torch.randn(part[1], 3, size, size, generator=generator))
        elif isinstance(part, tuple):
            added = [config.token_ids[part[0]]]
        else:
            added = [part]
        known = isinstance(part, tuple) and part[0] != "video"
        ids += added
        positions += [part[1] if known else NAN] * len(added)
    result = {"input_ids": torch.tensor([ids]), "positions": torch.tensor([positions], dtype=torch.float64)}
    if images:
        result["pixel_values"] = torch.cat(images)
    if videos:
        result |= {"pixel_values_videos": torch.cat(videos), "video_frames": torch.tensor(frames)}
    return result


def batch(samples: list[dict], side: str = "left", pad: int = 256) -> dict:
    """Several samples, padded to the longest."""
    longest = max(each["input_ids"].shape[1] for each in samples)

    def padded(name: str, value: float) -> torch.Tensor:
        rows = []
        for each in samples:
            missing = longest - each["input_ids"].shape[1]
            places = (missing, 0) if side == "left" else (0, missing)
            rows.append(torch.nn.functional.pad(each[name], places, value=value))
        return torch.cat(rows)

    for each in samples:
        each.setdefault("attention_mask", torch.ones_like(each["input_ids"]))
    names = {"input_ids": pad, "positions": NAN, "attention_mask": 0}
    if any("labels" in each for each in samples):
        names["labels"] = -100
    return {name: padded(name, fill) for name, fill in names.items()} | _pictures(samples)


def packed(samples: list[dict]) -> dict:
    """Several samples in one row, told apart by positions that start again."""
    names = [name for name in ("input_ids", "positions", "labels") if name in samples[0]]
    lengths = [each["input_ids"].shape[1] for each in samples]
    result = {name: torch.cat([each[name] for each in samples], 1) for name in names}
    result["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    result["sample"] = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))[None]
    return result | _pictures(samples)


def _pictures(samples: list[dict]) -> dict:
    found = {}
    for name in ("pixel_values", "pixel_values_videos", "video_frames"):
        if some := [each[name] for each in samples if name in each]:
            found[name] = torch.cat(some)
    return found
