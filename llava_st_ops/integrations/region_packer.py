"""What packers of TokenPacker's kind have in common: query, key and value each through layers and a LayerNorm, then
torch.nn.MultiheadAttention of one query over the keys of its region.

Keys and values run folded (docs/folding.md): their in-projections move to where there is one row per region, and they
are normalised while they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..nn.foldable import Kept, is_plain, why_no_mlp
from ..nn.folding import absorbing_matrices, without_autocast
from ..ops import lape_mlp, normalized_region_attention

Region = tuple[int, int, int]


@dataclass(frozen=True)
class Parts:
    """The layers of such a packer."""

    query_layers: nn.Module
    key_mlp: nn.Module
    value_mlp: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module
    value_norm: nn.Module
    attention: nn.Module

    def why_not_folded(self) -> str | None:
        """Why keys and values cannot run folded; None where they can."""
        for name in ("key_mlp", "value_mlp"):
            mlp = getattr(self, name)
            if (reason := why_no_mlp(mlp)) is not None:
                return f"{name}: {reason}"
            if mlp[0].bias is None or mlp[2].bias is None:
                return f"{name} has no bias"
        for name in ("key_norm", "value_norm"):
            norm = getattr(self, name)
            if not is_plain(norm, nn.LayerNorm) or norm.bias is None:
                return f"{name} is not a plain LayerNorm with scale and shift, but {norm}"
        return self._why_no_attention() or self._why_no_sizes()

    def _why_no_attention(self) -> str | None:
        attention = self.attention
        if not is_plain(attention, nn.MultiheadAttention):
            return f"attention is not a plain MultiheadAttention, but {type(attention).__name__}"
        if not is_plain(attention.out_proj, type(attention.out_proj)):
            return "attention.out_proj is not a plain layer"
        if attention.in_proj_weight is None or attention.in_proj_bias is None or attention.bias_k is not None:
            return "attention has separate in-projections, none of their biases, or a bias as a key"
        if attention.batch_first or attention.add_zero_attn:
            return "attention is batch_first or has a key of zeros"
        if attention.dropout and attention.training:
            return f"attention drops {attention.dropout:.0%} of the weights in training"
        return None

    def _why_no_sizes(self) -> str | None:
        width = self.attention.embed_dim
        for name in ("key", "value"):
            mlp, norm = getattr(self, f"{name}_mlp"), getattr(self, f"{name}_norm")
            widths = (mlp[0].out_features, mlp[2].in_features, mlp[2].out_features, *norm.normalized_shape)
            if widths != (width,) * 4:
                return f"{name}_mlp and {name}_norm are {widths} wide, the attention {width}"
        if self.key_mlp[0].in_features != self.value_mlp[0].in_features:
            return "key_mlp and value_mlp take features of other widths"
        if self.key_norm.eps != self.value_norm.eps:
            return f"key_norm and value_norm differ in eps, {self.key_norm.eps} and {self.value_norm.eps}"
        return None

    # What folding reads of the attention, by the names that it has in llava_st_ops.nn.
    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def in_proj_weight(self) -> Tensor:
        return self.attention.in_proj_weight

    @property
    def in_proj_bias(self) -> Tensor:
        return self.attention.in_proj_bias

    @property
    def out_proj(self) -> nn.Module:
        return self.attention.out_proj


@dataclass(frozen=True)
class _Folded:
    """Matrices of the folded attention; E channels in heads of D."""

    first_weight: Tensor  # [2 E, K], keys before values
    first_bias: Tensor  # [2 E]
    absorbed: Tensor  # [heads, D, E]: from a head's query to what is multiplied with normalised keys
    value_weight: Tensor  # [heads, E, D]
    out_bias: Tensor  # [E]: also what the biases of the values come to


def _fold(parts: Parts) -> _Folded:
    keys, values = parts.key_mlp[0], parts.value_mlp[0]
    with without_autocast(keys.weight.device):
        absorbed, value_weight, out_bias = absorbing_matrices(parts)
    dtype, heads = keys.weight.dtype, parts.num_heads
    return _Folded(
        first_weight=torch.cat([keys.weight, values.weight]),
        first_bias=torch.cat([keys.bias, values.bias]),
        absorbed=absorbed.to(dtype).unflatten(0, (heads, -1)),
        value_weight=value_weight.to(dtype).unflatten(0, (heads, -1)).transpose(1, 2),
        out_bias=out_bias.to(dtype),
    )


def attend(parts: Parts, kept: Kept, centers: Tensor, features: Tensor, region: Region) -> Tensor:
    """What a packer's attention gives, behind its output projection.

    Args:
        parts: its layers.
        kept: where folded matrices stay between calls.
        centers: `[B, T', H', W', C]`, what queries are made of.
        features: `[B, T, H, W, K]`, what keys and values are made of.
        region: tokens per region.

    Returns:
        `[B, T', H', W', E]`.
    """
    layers = [parts.key_mlp[0], parts.value_mlp[0], parts.key_norm, parts.value_norm, parts.attention]
    used = [parameter for layer in layers for parameter in layer.parameters()]
    folded = kept.get(used, parts.num_heads, lambda: _fold(parts))
    zero = folded.first_bias.new_zeros(1, folded.first_bias.shape[0])
    key, value = lape_mlp(
        features,
        folded.first_weight,
        folded.first_bias,
        [zero.expand(size, -1) for size in features.shape[1:4]],
        (parts.key_mlp[2].weight, parts.value_mlp[2].weight),
        (parts.key_mlp[2].bias, parts.value_mlp[2].bias),
    )
    weight, bias = (x.chunk(3)[0] for x in (parts.in_proj_weight, parts.in_proj_bias))
    query = linear(parts.query_norm(parts.query_layers(centers)), weight, bias)
    grid = query.shape[:-1]
    query = query.reshape(-1, *folded.absorbed.shape[:2]).transpose(0, 1)
    absorbed = torch.matmul(query, folded.absorbed).transpose(0, 1).unflatten(0, grid)
    pooled = normalized_region_attention(absorbed, key, value, region, parts.key_norm.eps)
    values = torch.matmul(pooled.flatten(0, -3).transpose(0, 1), folded.value_weight)
    return linear(values.transpose(0, 1).flatten(1), parts.out_proj.weight, folded.out_bias).unflatten(0, grid)


def tensors_given(arguments: Sequence[object], options: dict[str, object]) -> list[Tensor] | None:
    """The tensors of a call, those of a pair too, in order; None where it has arguments of other kinds (but None), or
    several by name, whose order says nothing."""
    if sum(value is not None for value in options.values()) > 1:
        return None
    flat: list[object] = []
    for argument in (*arguments, *options.values()):
        flat.extend(argument if isinstance(argument, (tuple, list)) else [argument])
    flat = [argument for argument in flat if argument is not None]
    return flat if all(isinstance(argument, Tensor) for argument in flat) else None
