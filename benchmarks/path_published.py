"""From vision features to tokens the published way: projector, positions, packers, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer

from .packer_published import PublishedSpatialTemporalPacker
from .position_peers import eager_add


class PublishedPath(nn.Module):
    """Features `[B, T, 27, 27, Cv] -> (slow, fast)`. The tables are trained, the projector is not."""

    def __init__(self, vision_dim: int, visual_dim: int, embed_dim: int, heads: int, anchors: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(vision_dim, visual_dim), nn.GELU(), nn.Linear(visual_dim, visual_dim)
        ).requires_grad_(False)
        # Of time, height and width, an input and an output one each.
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(anchors, visual_dim)) for _ in range(6))
        self.packer = PublishedSpatialTemporalPacker(visual_dim, embed_dim, heads)
        distance = torch.arange(anchors).unsqueeze(1) - torch.arange(anchors)
        self.register_buffer("propagation", 0.5 ** distance.abs().float(), persistent=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.projector(features)
        used = []
        for table in self.tables:
            spread = self.propagation.to(table.dtype) @ table
            used.append(table + spread - spread.detach())
        means = [(used[axis] + used[3 + axis]) / 2 for axis in range(3)]
        return self.packer(eager_add(projected, *means))


def tokenizer_like(published: PublishedPath, **options: object) -> VisualTokenizer:
    """Ours, with the same weights."""
    linear = published.projector[2]
    width, anchors = linear.out_features, len(published.tables[0])
    first = published.packer.token_packer.to_k[0]
    packer = SpatialTemporalPacker(width, first.out_features, published.packer.token_packer.attn.num_heads)
    packer.load_state_dict(published.packer.state_dict())
    lape = LanguageAlignedPositionalEmbedding(anchors, width)
    names = [f"{axis}_{side}" for side in ("input", "output") for axis in ("temporal", "height", "width")]
    lape.load_state_dict({name: table.detach() for name, table in zip(names, published.tables, strict=True)})
    tokenizer = VisualTokenizer(published.projector, lape, packer, **options)
    return tokenizer.to(linear.weight.device, linear.weight.dtype)
