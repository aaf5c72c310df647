"""The modules that llava_st_ops.integrations accelerates, as eager PyTorch: what tests and benchmarks compare with.

Written from the shapes, parameter names and formulas of the published modules, not from their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Region = tuple[int, int, int]


def _mlp(in_features: int, hidden: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out_features))


def _windows(x: Tensor, region: Region) -> Tensor:
    """`[T, H, W, C] -> [keys of a window, windows, C]`, windows in the order row, column, time."""
    t, h, w, c = x.shape
    rt, rh, rw = region
    x = x.reshape(t // rt, rt, h // rh, rh, w // rw, rw, c)
    return x.permute(1, 3, 5, 2, 4, 0, 6).reshape(rt * rh * rw, -1, c)


# LLaVA-ST ------------------------------------------------------------------------------------------------------------


class _DividedAttention(nn.Module):
    def __init__(self, visual_dim: int, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        for name in "qkv":
            setattr(self, f"to_{name}", _mlp(visual_dim, embed_dim, embed_dim))
            setattr(self, f"ln_{name}", nn.LayerNorm(embed_dim))
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.to_out = nn.Linear(embed_dim, visual_dim, bias=False)

    def forward(self, seeds: Tensor, features: Tensor, region: Region) -> Tensor:
        t, h, w, c = seeds.shape
        query = _windows(self.ln_q(self.to_q(seeds)), (1, 1, 1))
        key, value = (_windows(x, region) for x in (self.ln_k(self.to_k(features)), self.ln_v(self.to_v(features))))
        attended, _ = self.attn(query, key, value)
        return seeds + self.to_out(attended).view(h, w, t, c).permute(2, 0, 1, 3)


class LlavaStPacker(nn.Module):
    """`[T, H W, C] -> [T, H W / 9, C]`, or `[T / 5, H W, C]` where `temporal`."""

    def __init__(self, visual_dim: int, embed_dim: int, num_heads: int, temporal: bool = False) -> None:
        super().__init__()
        self.temporal = temporal
        self.devide_attention = _DividedAttention(visual_dim, embed_dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        t, n, c = x.shape
        side = math.isqrt(n)
        wide = x if x.dtype == torch.float64 else x.float()
        if not self.temporal:
            region = (1, 3, 3)
            rows = wide.view(t, side, side, c).permute(0, 3, 1, 2)
            seeds = F.interpolate(rows, size=(side // 3, side // 3), mode="bilinear").permute(0, 2, 3, 1)
        elif t == 1:
            region, seeds = (1, 1, 1), wide.view(t, side, side, c)
        else:
            region = (5, 1, 1)
            series = wide.permute(1, 2, 0)
            seeds = F.interpolate(series, size=t // 5, mode="linear").permute(2, 0, 1).view(t // 5, side, side, c)
        return self.devide_attention(seeds.to(x.dtype), x.view(t, side, side, c), region).flatten(1, 2)


class LlavaStResampler(nn.Module):
    """The three packers, by their names. Features `[T, 729, C] -> (slow, fast)`."""

    def __init__(self, visual_dim: int, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.token_packer = LlavaStPacker(visual_dim, embed_dim, num_heads)
        self.token_packer_slow = LlavaStPacker(visual_dim, embed_dim, num_heads, temporal=True)
        self.token_packer_fast = LlavaStPacker(visual_dim, embed_dim, num_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.token_packer(x)
        return self.token_packer_slow(packed), self.token_packer_fast(packed)


# TokenPacker ---------------------------------------------------------------------------------------------------------


class TokenPackerProjector(nn.Module):
    """`([N, H W, C], [N, H W, K]) -> [N, H W / scale^2, out]`."""

    def __init__(
        self, width: int, key_width: int, embed_dim: int, num_heads: int, out_features: int, scale_factor: int
    ) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.q_proj = nn.Linear(width, embed_dim, bias=False)
        self.k_proj = _mlp(key_width, embed_dim, embed_dim)
        self.v_proj = _mlp(key_width, embed_dim, embed_dim)
        for name in "qkv":
            setattr(self, f"ln_{name}", nn.LayerNorm(embed_dim, eps=1e-6))
        self.cross_attention = nn.MultiheadAttention(embed_dim, num_heads)
        self.mlp = _mlp(embed_dim, out_features, out_features)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        coarse, fine = features
        images, tokens, _ = coarse.shape
        side, scale = math.isqrt(tokens), self.scale_factor
        rows = (coarse if coarse.dtype == torch.float64 else coarse.float()).transpose(1, 2).unflatten(2, (side, side))
        seeds = F.interpolate(rows, size=(side // scale, side // scale), mode="bilinear").to(coarse.dtype)
        query = self.ln_q(self.q_proj(seeds.permute(0, 2, 3, 1)))
        key, value = self.ln_k(self.k_proj(fine)), self.ln_v(self.v_proj(fine))
        key, value = (_windows(x.unflatten(1, (side, side)), (1, scale, scale)) for x in (key, value))
        attended, _ = self.cross_attention(_windows(query, (1, 1, 1)), key, value)
        attended = attended.view(side // scale, side // scale, images, -1).permute(2, 0, 1, 3)
        return self.mlp(attended.flatten(1, 2))


# Oryx ----------------------------------------------------------------------------------------------------------------


class OryxCompressor(nn.Module):
    """`[T, H W, C] -> ([T, H' W', C], (H', W'))`; regions of 2 x 2 tokens for "video", 4 x 4 for "video_long"."""

    def __init__(self, width: int, mid: int = 256) -> None:
        super().__init__()
        self.vlm_query_projector = nn.Linear(width, mid)
        self.vlm_key_projector = nn.Linear(width, mid)

    def forward(
        self, features: Tensor, kind: str, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        t, n, c = features.shape
        height, width = (math.isqrt(n),) * 2 if size is None else size
        side = {"video": 2, "video_long": 4, "image": 1, "text": 1}[kind]
        pooled = F.avg_pool2d(features.view(t, height, width, c).permute(0, 3, 1, 2), side, side)
        pooled = pooled.flatten(2).transpose(1, 2)
        windows = features.view(t, height // side, side, width // side, side, c).permute(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(t, -1, side * side, c)
        query, key = self.vlm_query_projector(pooled).unsqueeze(2), self.vlm_key_projector(windows)
        scores = (query @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)).nan_to_num()
        return pooled + (scores.softmax(-1) @ windows).squeeze(2), (height // side, width // side)


# Cambrian and LongVU -------------------------------------------------------------------------------------------------


def _normalised(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, out_features, bias=False))


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SamplerAttention(nn.Module):
    """One query over windows of several towers: `(queries [B, 1, E], windows [B, n, K]..., masks [B, 1, 1, n]...)`."""

    def __init__(self, width: int, key_widths: Sequence[int], hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_of_kvs = len(key_widths)
        self.q_proj = _normalised(width, hidden)
        for tower, key_width in enumerate(key_widths):
            setattr(self, f"k_proj_{tower}", _normalised(key_width, hidden))
            setattr(self, f"v_proj_{tower}", _normalised(key_width, hidden))
        self.o_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, queries: Tensor, *windows_and_masks: Tensor) -> Tensor:
        windows, masks = windows_and_masks[: self.num_of_kvs], windows_and_masks[self.num_of_kvs :]
        key, value = (
            torch.cat([getattr(self, f"{name}_proj_{tower}")(x) for tower, x in enumerate(windows)], 1) for name in "kv"
        )
        heads = [_split(x, self.num_heads) for x in (self.q_proj(queries), key, value)]
        pooled = F.scaled_dot_product_attention(*heads, attn_mask=torch.cat(masks, -1))
        return self.o_proj(pooled.transpose(1, 2).flatten(2))


class TowerAttention(nn.Module):
    """Of one query over the window of one tower: `(window [B, n, K], queries [B, 1, E], mask [B, 1, 1, n])`."""

    def __init__(self, width: int, key_width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = _normalised(width, hidden)
        self.k_proj = _normalised(key_width, hidden)
        self.v_proj = _normalised(key_width, hidden)
        self.o_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, window: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        layers = ((self.q_proj, queries), (self.k_proj, window), (self.v_proj, window))
        heads = [_split(layer(x), self.num_heads) for layer, x in layers]
        pooled = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.o_proj(pooled.transpose(1, 2).flatten(2))


class _SamplerMlp(nn.Module):
    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden, bias=False)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class SamplerLayer(nn.Module):
    """Queries `[B, 1, Q]`, context `[B, 1, X]`, towers' windows `[B, n, K]` and masks `[B, n]` -> `[B, 1, Q]`."""

    def __init__(
        self,
        width: int,
        context_width: int,
        key_widths: Sequence[int],
        sides: Sequence[int],
        hidden: int,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.num_of_kvs = len(key_widths)
        self.proj_context = nn.Linear(context_width, hidden, bias=False)
        self.proj_in = nn.Linear(width + hidden, hidden, bias=False)
        self.proj_out = _SamplerMlp(hidden, hidden, width)
        self.norm = nn.LayerNorm(hidden)
        self.cross_attn = SamplerAttention(hidden, key_widths, hidden, num_heads)
        for tower, side in enumerate(sides):
            if side > 1:
                setattr(self, f"pos_embed_{tower}", nn.Parameter(torch.randn(side**2, key_widths[tower])))

    def forward(self, queries: Tensor, context: Tensor, *windows_and_masks: Tensor) -> Tensor:
        windows, masks = windows_and_masks[: self.num_of_kvs], windows_and_masks[self.num_of_kvs :]
        placed = [
            x + getattr(self, f"pos_embed_{tower}").to(x.dtype) if x.shape[1] > 1 else x
            for tower, x in enumerate(windows)
        ]
        hidden = self.proj_in(torch.cat([queries, self.proj_context(context)], -1))
        attended = self.cross_attn(hidden, *placed, *(mask.view(len(mask), 1, 1, -1) for mask in masks))
        return queries + self.proj_out(self.norm(hidden + attended))
