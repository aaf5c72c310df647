"""Small visual tokenizers for the tests, and their results."""

from __future__ import annotations

import torch
from torch import nn

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding, SpatialTemporalPacker, VisualTokenizer

VISION, WIDTH, EMBED, HEADS = 12, 24, 32, 4


def make(dtype=torch.float64, lape=True, bias=True, std=0.3, factors=(3, 5, 3), **options) -> VisualTokenizer:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(VISION, WIDTH, bias=bias), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=bias))
    text_aligned, compat = options.pop("text_aligned", False), options.pop("compat", "paper")
    tables = LanguageAlignedPositionalEmbedding((12, 10, 11), WIDTH, text_aligned=text_aligned, compat=compat)
    packer = SpatialTemporalPacker(WIDTH, EMBED, HEADS, *factors)
    tokenizer = VisualTokenizer(projector, tables if lape else None, packer, **options).to(dtype)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=std)
    return tokenizer


def features_of(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, VISION, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def outputs(tokenizer, features=None):
    features = features_of(1, 5, 9, 9, dtype=next(tokenizer.parameters()).dtype) if features is None else features
    with torch.no_grad():
        return torch.cat([stream.flatten() for stream in tokenizer(features)])


def directly(tokenizer):
    tokenizer.execution = "direct"
    result = outputs(tokenizer)
    tokenizer.execution = "folded"
    return result


def assert_up_to_date(tokenizer):
    torch.testing.assert_close(outputs(tokenizer), directly(tokenizer), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def edit_in_place(tokenizer):
    tokenizer.packer.spatial.key_mlp[0].weight[0, 0] += 5
