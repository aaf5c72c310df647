"""The frozen vision tower: layer by layer, a few frames at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import SiglipVisionModel


@torch.no_grad()
def vision_features(tower: SiglipVisionModel, pixels: Tensor, chunk_frames: int) -> Tensor:
    """Pictures `[N, 3, S, S]` -> what the last layer gives, `[N, rows, columns, Cv]`, without the tower's last norm.

    Memory besides the result is that of `chunk_frames` pictures in one layer.
    """
    embeddings, layers = tower.embeddings, tower.encoder.layers
    side = embeddings.image_size // embeddings.patch_size
    if pixels.dim() != 4 or pixels.shape[1:] != (3, embeddings.image_size, embeddings.image_size):
        size = embeddings.image_size
        raise ValueError(f"pixels: expected shape [N, 3, {size}, {size}], got {list(pixels.shape)}")
    weight = embeddings.patch_embedding.weight
    features = pixels.new_empty(len(pixels), side, side, embeddings.embed_dim, dtype=weight.dtype, device=weight.device)
    for some, result in zip(pixels.split(chunk_frames), features.flatten(1, 2).split(chunk_frames), strict=True):
        hidden = embeddings(some.to(features))
        for layer in layers:
            hidden = layer(hidden, None)
        result.copy_(hidden)
    return features
