"""Region attention over normalised keys and values that all heads share, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lape import computing_dtype
from .point_to_region_attention import clip_region, gather_regions, scatter_regions, softmax_of_regions


def normalized_region_attention(
    query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], eps: float = 1e-5
) -> Tensor:
    """query `[B, T', H', W', heads, E]`, key and value `[B, T, H, W, E]` -> like query."""
    grid = key.shape[1:4]
    region = clip_region(region, grid)
    keys, values = (
        gather_regions(torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps).unsqueeze(-2), region)
        for x in (key, value)
    )
    scores = torch.matmul(query.unsqueeze(-3), keys.transpose(-1, -2))
    return torch.matmul(softmax_of_regions(scores, grid, region), values).squeeze(-3)


def normalized_region_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, written out; computed in float32 or better and rounded once."""
    grid = key.shape[1:4]
    region = clip_region(region, grid)
    wide = computing_dtype(query.dtype)
    grad, u = (x.to(wide).unsqueeze(-3) for x in (grad_output, query))
    normalized, inverse = zip(*(_normalize(x.to(wide), eps) for x in (key, value)), strict=True)
    keys, values = (gather_regions(x.unsqueeze(-2), region) for x in normalized)
    weights = softmax_of_regions(torch.matmul(u, keys.transpose(-1, -2)), grid, region)
    grad_weights = torch.matmul(grad, values.transpose(-1, -2))
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_query = torch.matmul(grad_scores, keys).squeeze(-3)
    grads = [grad_query]
    for factors, rows, x, scale in zip((grad_scores, weights), (u, grad), normalized, inverse, strict=True):
        grad_x = scatter_regions(torch.matmul(factors.transpose(-1, -2), rows), region, grid).squeeze(-2)
        along = (grad_x * x).mean(-1, keepdim=True)
        grads.append(scale * (grad_x - grad_x.mean(-1, keepdim=True) - x * along))
    grad_query, grad_key, grad_value = (x.to(query.dtype) for x in grads)
    return grad_query, grad_key, grad_value


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of x with mean 0 and variance 1, and what they were multiplied with."""
    centered = x - x.mean(-1, keepdim=True)
    inverse = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centered * inverse, inverse
