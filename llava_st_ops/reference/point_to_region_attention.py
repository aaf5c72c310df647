"""Point-to-region attention in plain PyTorch: each query attends to the keys of its own block of the grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _pad_to_regions(x: Tensor, region: Sequence[int]) -> Tensor:
    """Pads time, height and width of `[B, T, H, W, heads, D]` with zeros to multiples of the region."""
    t, h, w = (-size % step for size, step in zip(x.shape[1:4], region, strict=True))
    return torch.nn.functional.pad(x, [0, 0, 0, 0, 0, w, 0, h, 0, t]) if t or h or w else x


def gather_regions(x: Tensor, region: Sequence[int]) -> Tensor:
    """`[B, T, H, W, heads, D]` to `[B, T', H', W', heads, keys, D]`, the keys of a region in row-major order."""
    rt, rh, rw = region
    x = _pad_to_regions(x, region)
    b, t, h, w, heads, dim = x.shape
    x = x.reshape(b, t // rt, rt, h // rh, rh, w // rw, rw, heads, dim)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(b, t // rt, h // rh, w // rw, heads, rt * rh * rw, dim)


def scatter_regions(regions: Tensor, region: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `gather_regions`, without the padding: back to `[B, T, H, W, heads, D]`."""
    b, t, h, w, heads, _, dim = regions.shape
    rt, rh, rw = region
    x = regions.reshape(b, t, h, w, heads, rt, rh, rw, dim).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    x = x.reshape(b, t * rt, h * rh, w * rw, heads, dim)
    return x[:, : grid[0], : grid[1], : grid[2]].contiguous()


def clip_region(region: Sequence[int], grid: Sequence[int]) -> list[int]:
    """A region larger than the grid is the whole grid; padding the grid to its size would only cost memory."""
    return [max(1, min(step, size)) for step, size in zip(region, grid, strict=True)]


def _default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def _hide_masked(x: Tensor, masked: Tensor | None) -> Tensor:
    """Gathered keys or values, with zeros for those that are masked: whatever they hold, they take no part."""
    return x if masked is None else x.masked_fill(masked.transpose(-1, -2), 0)


def _gather_bias(bias: Tensor | None, region: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """`[B, T, H, W, heads]` to `[B, T', H', W', heads, 1, keys]`, and where that masks keys."""
    if bias is None:
        return None, None
    gathered = gather_regions(bias.unsqueeze(-1), region).transpose(-1, -2)
    return gathered, gathered == -math.inf


def _weights(
    query: Tensor,
    keys: Tensor,
    grid: Sequence[int],
    region: Sequence[int],
    scale: float,
    bias: Tensor | None,
    masked: Tensor | None,
) -> Tensor:
    """Attention weights `[B, T', H', W', heads, 1, keys]` of queries over gathered keys, zero for what is no key."""
    scores = torch.matmul(query.unsqueeze(-2) * scale, keys.transpose(-1, -2))
    if bias is None or masked is None:
        return softmax_of_regions(scores, grid, region)
    scores = _fill_padding((scores + bias).masked_fill(masked, -math.inf), grid, region)
    alone = (scores == -math.inf).all(-1, keepdim=True)  # a query to which no key is left
    return scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)


def _fill_padding(scores: Tensor, grid: Sequence[int], region: Sequence[int]) -> Tensor:
    """Scores `[B, T', H', W', heads, rows, keys]` of gathered keys, -inf where padded."""
    if any(size % step for size, step in zip(grid, region, strict=True)):
        inside = torch.ones((1, *grid, 1, 1), dtype=torch.bool, device=scores.device)
        return scores.masked_fill(~gather_regions(inside, region).transpose(-1, -2), -math.inf)
    return scores


def softmax_of_regions(scores: Tensor, grid: Sequence[int], region: Sequence[int]) -> Tensor:
    """Weights from scores `[B, T', H', W', heads, rows, keys]` of gathered keys, zero where padded."""
    return _fill_padding(scores, grid, region).softmax(-1)


def point_to_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query `[B, T', H', W', heads, D]`, key `[B, T, H, W, heads, D]`, value `[B, T, H, W, heads, Dv]`, bias
    `[B, T, H, W, heads]` -> `[B, T', H', W', heads, Dv]`."""
    scale = _default_scale(query.shape[-1]) if scale is None else scale
    grid = key.shape[1:4]
    region = clip_region(region, grid)
    biases, masked = _gather_bias(bias, region)
    keys, values = (_hide_masked(gather_regions(x, region), masked) for x in (key, value))
    weights = _weights(query, keys, grid, region, scale, biases, masked)
    return torch.matmul(weights, values).squeeze(-2)


def point_to_region_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and bias (`[0]` of none), written out: what a raw `_backward` op does where it
    has no kernel."""
    scale = _default_scale(query.shape[-1]) if scale is None else scale
    grid = key.shape[1:4]
    region = clip_region(region, grid)
    biases, masked = _gather_bias(bias, region)
    keys, values = (_hide_masked(gather_regions(x, region), masked) for x in (key, value))
    weights = _weights(query, keys, grid, region, scale, biases, masked)
    grad_output = grad_output.unsqueeze(-2)
    grad_weights = torch.matmul(grad_output, values.transpose(-1, -2))
    grad_biases = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    if masked is not None:
        grad_biases = grad_biases.masked_fill(masked, 0)
    grad_scores = grad_biases * scale
    grad_query = torch.matmul(grad_scores, keys).squeeze(-2)
    grad_keys = _hide_masked(grad_scores.transpose(-1, -2) * query.unsqueeze(-2), masked)
    grad_values = _hide_masked(weights.transpose(-1, -2) * grad_output, masked)
    if bias is None:
        grad_bias = query.new_empty(0)
    else:
        grad_bias = scatter_regions(grad_biases.transpose(-1, -2), region, grid).squeeze(-1)
    return grad_query, scatter_regions(grad_keys, region, grid), scatter_regions(grad_values, region, grid), grad_bias


def _videos(grid_thw: Tensor, region: Sequence[int]) -> Iterator[tuple[slice, list[int], slice, list[int]]]:
    """For each video its rows of the packed queries, the grid they form, its rows of the tokens, and their grid."""
    first_query = first_key = 0
    for grid in grid_thw.tolist():
        regions = [-(-size // step) for size, step in zip(grid, region, strict=True)]
        end_query, end_key = first_query + math.prod(regions), first_key + math.prod(grid)
        yield slice(first_query, end_query), regions, slice(first_key, end_key), grid
        first_query, first_key = end_query, end_key


def point_to_region_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query `[queries, heads, D]`, key `[tokens, heads, D]`, value `[tokens, heads, Dv]`, grid_thw int `[videos, 3]`,
    bias `[tokens, heads]` -> `[queries, heads, Dv]`.

    Tokens and queries of the videos follow each other. Reads `grid_thw` back to the host.
    """
    outputs = []
    for queries, regions, keys, grid in _videos(grid_thw, region):
        q = query[queries].unflatten(0, (1, *regions))
        k, v, b = (None if x is None else x[keys].unflatten(0, (1, *grid)) for x in (key, value, bias))
        outputs.append(point_to_region_attention(q, k, v, region, scale, b).flatten(0, 3))
    return torch.cat(outputs) if outputs else query.new_empty((*query.shape[:-1], value.shape[-1]))


def point_to_region_attention_packed_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and bias (`[0]` of none) of the packed form."""
    grads = [query.new_empty(0 if x is None else x.shape) for x in (query, key, value, bias)]
    for queries, regions, keys, grid in _videos(grid_thw, region):
        g, q = (x[queries].unflatten(0, (1, *regions)) for x in (grad_output, query))
        k, v, b = (None if x is None else x[keys].unflatten(0, (1, *grid)) for x in (key, value, bias))
        parts = point_to_region_attention_backward(g, q, k, v, region, scale, b)
        for grad, rows, part in zip(grads[: 3 + (bias is not None)], (queries, keys, keys, keys), parts, strict=False):
            grad[rows] = part.flatten(0, 3)
    return grads[0], grads[1], grads[2], grads[3]
