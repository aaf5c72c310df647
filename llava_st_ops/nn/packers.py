"""The packers of LLaVA-ST: modules that compress a video's features by point-to-region attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import point_to_region_attention, region_centers
from .foldable import Foldable, is_plain, why_no_mlp
from .folding import FoldedPacker, fold, no_positions, pack
from .published_names import PACKER_PARTS, PACKERS, WRAPPER, rename


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class PointToRegionPacker(Foldable):
    """Packs each region of a grid into one token: its centre, plus what the centre attends to in its region.

    Queries come from the region centres, keys and values from all features; each goes through an MLP, a LayerNorm and
    the in-projection of multi-head attention. `output = centre + output_projection(out_projection(attention))`.

    Args:
        visual_dim: width C of the features.
        embed_dim: width of the attention, a multiple of `num_heads`; `embed_dim / num_heads` is at most 1,152.
        num_heads: attention heads.
        region: tokens per region along time, height and width; LLaVA-ST uses `(1, 3, 3)` and `(5, 1, 1)`.
        eps: of the LayerNorms; TokenPacker uses 1e-6.
        execution: `"direct"`, or `"folded"`: the same function with linear maps moved to where there are fewest rows
            (docs/folding.md), which is faster and, in low precision, in the median not less exact. May be set on a
            living module. Layers that are not plain ones (adapters, quantised weights, hooks) run direct, with a
            notice.

    Shapes: `[B, T, H, W, C] -> [B, ceil(T / rt), ceil(H / rh), ceil(W / rw), C]`, for any T, H and W.

    `load_state_dict` also accepts the names of LLaVA-ST's checkpoints (`devide_attention.to_q.0.weight`, ...).

    Raises:
        ValueError: `embed_dim` is no multiple of `num_heads`; another word for `execution`.

    Source: LLaVA-ST (arXiv:2501.08282), Spatial-Temporal Packer; the scheme is TokenPacker's (arXiv:2407.02392).
    """

    def __init__(
        self,
        visual_dim: int,
        embed_dim: int,
        num_heads: int,
        region: Sequence[int],
        eps: float = 1e-5,
        execution: str = "direct",
    ) -> None:
        super().__init__(execution)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, {num_heads}, got {embed_dim}")
        self.num_heads = num_heads
        self.region = tuple(region)
        self.query_mlp = _mlp(visual_dim, embed_dim)
        self.key_mlp = _mlp(visual_dim, embed_dim)
        self.value_mlp = _mlp(visual_dim, embed_dim)
        self.query_norm = nn.LayerNorm(embed_dim, eps)
        self.key_norm = nn.LayerNorm(embed_dim, eps)
        self.value_norm = nn.LayerNorm(embed_dim, eps)
        # One parameter for the three in-projections, as in torch.nn.MultiheadAttention.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, visual_dim, bias=False)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(self._accept_published_names)

    def reset_parameters(self) -> None:
        """The initialisation of the published packer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Packs features.

        Args:
            features: `[B, T, H, W, C]`.

        Returns:
            `[B, T', H', W', C]`, one token per region; `T' = ceil(T / rt)` and so on.
        """
        # Contiguous: torch makes many small products of a linear layer over strided rows.
        centers = region_centers(features, self.region).contiguous()
        if self._runs_folded():
            folded = self.folded()
            return pack(folded, centers, features, no_positions(folded, features.shape[1:4]))
        query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
        query_bias, key_bias, value_bias = self.in_proj_bias.chunk(3)
        query = nn.functional.linear(self.query_norm(self.query_mlp(centers)), query_weight, query_bias)
        key = nn.functional.linear(self.key_norm(self.key_mlp(features)), key_weight, key_bias)
        value = nn.functional.linear(self.value_norm(self.value_mlp(features)), value_weight, value_bias)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        pooled = point_to_region_attention(query, key, value, self.region).flatten(-2)
        return centers + self.output(self.out_proj(pooled))

    def folded(self) -> FoldedPacker:
        """The matrices of the folded execution.

        Returns:
            Computed once, and anew when a parameter has changed; in the graph where gradients are wanted.
        """
        return self._kept.get(list(self.parameters()), self.settings(), lambda: fold(self, None))

    def settings(self) -> tuple[Any, ...]:
        """What the folded matrices depend on besides parameters.

        Returns:
            The region, the number of heads, and the eps of the norms of queries and keys.
        """
        return self.region, self.num_heads, self.query_norm.eps, self.key_norm.eps

    def why_not_folded(self) -> str | None:
        for name in ("query_mlp", "key_mlp", "value_mlp"):
            mlp = getattr(self, name)
            if (reason := why_no_mlp(mlp)) is not None:
                return f"{name}: {reason}"
            if mlp[0].bias is None or mlp[2].bias is None:
                return f"{name} has no bias"
        for name in ("query_norm", "key_norm", "value_norm", "out_proj", "output"):
            layer, kind = getattr(self, name), nn.LayerNorm if name.endswith("norm") else nn.Linear
            if not is_plain(layer, kind):
                return f"{name} is not a plain {kind.__name__}, but {type(layer).__name__}"
            if (layer.bias is None) != (name == "output"):
                return f"{name} has {'no' if layer.bias is None else 'a'} bias"
        if self.key_norm.eps != self.value_norm.eps:
            return f"key_norm and value_norm differ in eps, {self.key_norm.eps} and {self.value_norm.eps}"
        return None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, region={self.region}, execution={self.execution!r}"

    @staticmethod
    def _accept_published_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        rename(state_dict, prefix, {WRAPPER: ""})
        rename(state_dict, prefix, PACKER_PARTS)


class SpatialTemporalPacker(nn.Module):
    """LLaVA-ST's Spatial-Temporal Packer: a video's features to a slow and a fast stream of tokens.

    A spatial packer shrinks every frame; from its output a temporal packer makes the slow stream (few frames, more
    tokens each), and a second spatial packer the fast stream (all frames, few tokens each).

    Args:
        visual_dim: width C of the features.
        embed_dim: width of the attention, a multiple of `num_heads`.
        num_heads: attention heads.
        spatial_factor: side, in tokens, of the regions of the first packer.
        temporal_factor: frames per region of the slow stream.
        fast_factor: side of the regions of the fast stream, in tokens of the first packer's output.
        execution: of all three packers, `"direct"` or `"folded"` (see `PointToRegionPacker`).

    Shapes, for a 27 x 27 grid and the default factors: `[B, T, 27, 27, C] -> (slow [B, ceil(T / 5), 9, 9, C],
    fast [B, T, 3, 3, C])`. Any T, any grid, any width; a single frame is its own slow seed.

    `load_state_dict` also accepts the names of LLaVA-ST's checkpoints
    (`token_packer.devide_attention.to_q.0.weight`, ...).

    Source: LLaVA-ST (arXiv:2501.08282), Spatial-Temporal Packer.
    """

    def __init__(
        self,
        visual_dim: int,
        embed_dim: int,
        num_heads: int,
        spatial_factor: int = 3,
        temporal_factor: int = 5,
        fast_factor: int = 3,
        execution: str = "direct",
    ) -> None:
        super().__init__()
        regions = {
            "spatial": (1, spatial_factor, spatial_factor),
            "slow": (temporal_factor, 1, 1),
            "fast": (1, fast_factor, fast_factor),
        }
        for name, region in regions.items():
            setattr(self, name, PointToRegionPacker(visual_dim, embed_dim, num_heads, region, execution=execution))
        self.register_load_state_dict_pre_hook(self._accept_published_names)

    @property
    def execution(self) -> str:
        """Of all three packers, `"direct"` or `"folded"`; may be set at any time."""
        return self.spatial.execution

    @execution.setter
    def execution(self, execution: str) -> None:
        for packer in (self.spatial, self.slow, self.fast):
            packer.execution = execution

    def refresh(self) -> None:
        """To be called after writes to parameters that torch does not see (through `.data`)."""
        for packer in (self.spatial, self.slow, self.fast):
            packer.refresh()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Packs the features of videos.

        Args:
            features: `[B, T, H, W, C]`.

        Returns:
            `(slow, fast)`, both `[B, T', H', W', C]`, on grids of their own.
        """
        packed = self.spatial(features)
        return self.slow(packed), self.fast(packed)

    @staticmethod
    def _accept_published_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        rename(state_dict, prefix, PACKERS)
