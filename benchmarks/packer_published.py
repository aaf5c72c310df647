"""The Spatial-Temporal Packer the published way: eager modules around torch.nn.MultiheadAttention.

Written from the shapes, names and formulas of the published system, with its parameter names, so that weights move
between this and `llava_st_ops.nn`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class PublishedPacker(nn.Module):
    """Packs each region into its centre. Features `[B, T, H, W, C] -> [B, T/rt, H/rh, W/rw, C]`, odd regions."""

    def __init__(self, visual_dim: int, embed_dim: int, num_heads: int, region: tuple[int, int, int]) -> None:
        super().__init__()
        self.region = region
        self.to_q = _mlp(visual_dim, embed_dim)
        self.to_k = _mlp(visual_dim, embed_dim)
        self.to_v = _mlp(visual_dim, embed_dim)
        self.ln_q = nn.LayerNorm(embed_dim)
        self.ln_k = nn.LayerNorm(embed_dim)
        self.ln_v = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.to_out = nn.Linear(embed_dim, visual_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        rt, rh, rw = self.region
        # With odd regions that divide the grid, the published interpolation is the centre sample.
        seeds = features[:, rt // 2 :: rt, rh // 2 :: rh, rw // 2 :: rw]
        b, t, h, w, _ = seeds.shape
        query = self.ln_q(self.to_q(seeds))
        key = self.ln_k(self.to_k(features))
        value = self.ln_v(self.to_v(features))

        def flatten(x: Tensor) -> Tensor:
            """To `[window, regions, E]`, regions in the order row, column, batch, time."""
            x = x.view(b, t, rt, h, rh, w, rw, -1).permute(2, 4, 6, 3, 5, 0, 1, 7)
            return x.reshape(rt * rh * rw, h * w * b * t, -1)

        query = query.permute(2, 3, 0, 1, 4).reshape(1, h * w * b * t, -1)
        attended, _ = self.attn(query, flatten(key), flatten(value))
        attended = self.to_out(attended).view(h, w, b, t, -1).permute(2, 3, 0, 1, 4)
        return seeds + attended


class PublishedSpatialTemporalPacker(nn.Module):
    """The three packers: features `[B, T, 27, 27, C] -> (slow [B, T/5, 9, 9, C], fast [B, T, 3, 3, C])`."""

    def __init__(self, visual_dim: int, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.token_packer = PublishedPacker(visual_dim, embed_dim, num_heads, (1, 3, 3))
        self.token_packer_slow = PublishedPacker(visual_dim, embed_dim, num_heads, (5, 1, 1))
        self.token_packer_fast = PublishedPacker(visual_dim, embed_dim, num_heads, (1, 3, 3))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.token_packer(features)
        return self.token_packer_slow(packed), self.token_packer_fast(packed)


def seeded(visual_dim: int, embed_dim: int, num_heads: int) -> PublishedSpatialTemporalPacker:
    """The packer with weights that are the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PublishedSpatialTemporalPacker(visual_dim, embed_dim, num_heads)
