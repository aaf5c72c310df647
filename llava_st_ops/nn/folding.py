"""A packer with its linear maps moved to where they are applied to the fewest rows (docs/folding.md).

- Head absorption: there is one query for many keys, so the in-projection of the keys, and the scale of their LayerNorm,
  move to the queries; those of the values move behind the pooling.
- The first layers of the key and the value MLP are one product.
- What is linear before them, the second layer of a projector and LAPE's addition, is multiplied into them.
- Biases of the values are part of the bias behind the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from ..ops import lape_mlp, normalized_region_attention
from ..ops.registration import autocast_is_on
from ..reference.lape import computing_dtype

Tables = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class FoldedPacker:
    """The matrices of a folded packer. Heads have D channels each, the packer E, features K, and results C.

    `positions` are what anchors of time, height and width add before the GELU, `[n, 2 E]` each; None without LAPE.
    """

    region: tuple[int, int, int]
    eps: float  # of the LayerNorms of keys and values
    query_eps: float
    query_layers: tuple[Tensor, ...]  # weight and bias: two layers, the LayerNorm, the in-projection
    first_weight: Tensor  # [2 E, K], keys before values
    first_bias: Tensor  # [2 E]
    positions: Tables | None
    second_weights: tuple[Tensor, Tensor]  # [E, E] each
    second_biases: tuple[Tensor, Tensor]
    absorbed: Tensor  # [heads, D, E]: from a head's query to what is multiplied with normalised keys
    value_weight: Tensor  # [heads, E, D]
    out_weight: Tensor  # [heads D, heads D]
    out_bias: Tensor  # [heads D]: also what the biases of the values come to
    output_weight: Tensor  # [C, heads D]


@dataclass(frozen=True)
class Before:
    """What is linear before a packer: a projector's second layer, and LAPE's tables or None."""

    weight: Tensor
    bias: Tensor | None
    tables: Tables | None


def fold(packer: nn.Module, before: Before | None) -> FoldedPacker:
    """The matrices of a `PointToRegionPacker`, part of the graph where gradients are wanted."""
    keys, values = packer.key_mlp, packer.value_mlp
    first_weight = torch.cat([keys[0].weight, values[0].weight])
    composite = first_weight if before is None else first_weight @ before.weight
    with without_autocast(first_weight.device):  # small, and added to what is not rounded yet
        first_bias, positions = _first_positions(first_weight, torch.cat([keys[0].bias, values[0].bias]), before)
        absorbed, value_weight, out_bias = absorbing_matrices(packer)
    dtype, heads = first_weight.dtype, packer.num_heads
    query_mlp = packer.query_mlp
    return FoldedPacker(
        region=packer.region,
        eps=packer.key_norm.eps,
        query_eps=packer.query_norm.eps,
        query_layers=(
            query_mlp[0].weight,
            query_mlp[0].bias,
            query_mlp[2].weight,
            query_mlp[2].bias,
            packer.query_norm.weight,
            packer.query_norm.bias,
            packer.in_proj_weight.chunk(3)[0],
            packer.in_proj_bias.chunk(3)[0],
        ),
        first_weight=composite,
        first_bias=first_bias,
        positions=positions,
        second_weights=(keys[2].weight, values[2].weight),
        second_biases=(keys[2].bias, values[2].bias),
        absorbed=absorbed.to(dtype).unflatten(0, (heads, -1)),
        value_weight=value_weight.to(dtype).unflatten(0, (heads, -1)).transpose(1, 2),
        out_weight=packer.out_proj.weight,
        out_bias=out_bias.to(dtype),
        output_weight=packer.output.weight,
    )


def _first_positions(weight: Tensor, bias: Tensor, before: Before | None) -> tuple[Tensor, Tables | None]:
    """What is added before the GELU everywhere, and at the anchors of each axis."""
    if before is None:
        return bias, None
    weight, bias = _wide(weight), _wide(bias)
    if before.bias is not None:
        bias = linear(_wide(before.bias), weight, bias)
    if before.tables is None:
        return bias, None
    temporal, height, width = (linear(_wide(table), weight) for table in before.tables)
    return bias, (temporal, height, width)


def absorbing_matrices(packer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The in-projections of keys and values, `[heads D, E]` both, with what their LayerNorms multiply, and the bias
    behind the pooling, which the biases of the values reach unchanged."""
    _, key_weight, value_weight = (_wide(weight) for weight in packer.in_proj_weight.chunk(3))
    _, _, value_bias = (_wide(bias) for bias in packer.in_proj_bias.chunk(3))
    scale = (len(key_weight) // packer.num_heads) ** -0.5
    # The softmax does not see what is the same for all keys of a region, such as the LayerNorm's shift.
    gain = with_zero_gradient(packer.key_norm.weight, packer.key_norm.bias)
    value_bias = linear(_wide(packer.value_norm.bias), value_weight, value_bias)
    out_bias = linear(value_bias, _wide(packer.out_proj.weight), _wide(packer.out_proj.bias))
    return key_weight * (_wide(gain) * scale), value_weight * _wide(packer.value_norm.weight), out_bias


def pack(folded: FoldedPacker, centers: Tensor, features: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """What a packer makes of features.

    Args:
        folded: its matrices.
        centers: `[B, T', H', W', C]`, the centres of the regions, as the packer itself would see them.
        features: `[B, T, H, W, K]`, what `folded.first_weight` is for.
        positions: what frames, rows and columns add before the GELU: `[T, 2 E]`, `[H, 2 E]`, `[W, 2 E]`.
    """
    key, value = lape_mlp(
        features, folded.first_weight, folded.first_bias, positions, folded.second_weights, folded.second_biases
    )
    query, grid = _query(folded, centers), centers.shape[:4]
    query = query.reshape(-1, folded.absorbed.shape[0], folded.absorbed.shape[1]).transpose(0, 1)
    absorbed = torch.matmul(query, folded.absorbed).transpose(0, 1).unflatten(0, grid)
    pooled = normalized_region_attention(absorbed, key, value, folded.region, folded.eps)
    values = torch.matmul(pooled.flatten(0, 3).transpose(0, 1), folded.value_weight)
    attended = linear(values.transpose(0, 1).flatten(1), folded.out_weight, folded.out_bias)
    if centers.dtype != attended.dtype:  # under autocast
        return centers + linear(attended, folded.output_weight).unflatten(0, grid)
    # One product that adds to the centres, and is rounded once. The two matrices are not multiplied into one: that
    # would save less than one percent, and need a bias besides.
    return torch.addmm(centers.flatten(0, 3), attended, folded.output_weight.t()).unflatten(0, grid)


def _query(folded: FoldedPacker, centers: Tensor) -> Tensor:
    first, first_bias, second, second_bias, gain, shift, weight, bias = folded.query_layers
    x = linear(gelu(linear(centers, first, first_bias)), second, second_bias)
    return linear(layer_norm(x, gain.shape, gain, shift, folded.query_eps), weight, bias)


def no_positions(folded: FoldedPacker, grid: Sequence[int]) -> list[Tensor]:
    """Of a packer that has no LAPE before it."""
    zero = folded.first_bias.new_zeros(1, folded.first_bias.shape[0])
    return [zero.expand(size, -1) for size in grid]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products of weights with weights are small, and keep their own dtype."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device.type) else nullcontext()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(computing_dtype(tensor.dtype))


def with_zero_gradient(x: Tensor, unused: Tensor) -> Tensor:
    """x, and a gradient of zeros for a parameter of the same shape that the result does not depend on."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=x.device), unused, x)
