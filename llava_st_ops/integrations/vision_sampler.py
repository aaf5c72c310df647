"""Cambrian's Spatial Vision Aggregator, which LongVU took over: one query per place attends to windows of the feature
maps of several vision towers.

Replaced are its attentions alone, those of all towers together (`k_proj_0`, `v_proj_0`, ...) and those of one tower
(`k_proj`, `v_proj`). What is around them, the learned positions inside windows too, runs as it is.

There is one query for the keys of all windows, so projections of keys and values, each with a LayerNorm before it,
move to the queries and behind the pooling (docs/folding.md). What the LayerNorms add is the same for all keys of a
tower, but not of all towers: it is added to the scores. What is left between is a sum over few keys per tower, with
queries and results of each tower's own, which plain matrix products do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..nn.foldable import is_plain
from ..nn.folding import without_autocast
from ..reference.lape import computing_dtype
from .replacement import Replacement, Report, accelerate


def accelerate_vision_sampler(model: nn.Module, *, check: bool = True) -> Report:
    """Replaces the forward of the attentions in Cambrian's or LongVU's vision sampler by one that computes the same,
    faster.

    Known by their projections: `q_proj`, and `k_proj_0`, `v_proj_0`, ... of several towers or `k_proj`, `v_proj` of
    one, each a LayerNorm and a Linear, then `o_proj`. Queries are `[B, 1, Q]`, windows `[B, n, K]`, masks boolean
    `[B, 1, 1, n]` with True where a key is seen; `[B, 1, Q]` comes out. Where no key is seen the attention gives zeros,
    as torch's does. Calls with more queries or with additive masks take the modules' own forward. Dtypes, training,
    autocast, compiling, state dict: as in `accelerate_llava_st`.

    Args:
        model: any module with the sampler somewhere in it. Changed in place.
        check: compare the first result of each attention with that of its own forward, once, and leave that in its
            place where they differ.

    Returns:
        What was replaced and what was skipped, with reasons. `undo()`, or the end of a `with` block, takes all back.

    Raises:
        TypeError: model is not a module.

    Source: Cambrian-1 (arXiv:2406.16860), LongVU (arXiv:2410.17434).
    """

    def recognise(name: str, module: nn.Module) -> Replacement | str | None:
        layers = module._modules
        suffixes = [layer.removeprefix("k_proj") for layer in layers if re.fullmatch(r"k_proj(_\d+)?", layer)]
        # The attentions of language models have such names too; their projections are Linear.
        if "q_proj" not in layers or not any(isinstance(layers[f"k_proj{x}"], nn.Sequential) for x in suffixes):
            return None
        if suffixes != [""]:
            suffixes = [f"_{tower}" for tower in range(len(suffixes))]
        known = {"q_proj", "o_proj", *(f"{kind}_proj{suffix}" for kind in "kv" for suffix in suffixes)}
        if differing := sorted(known ^ {*layers, *module._parameters}):
            return f"it lacks, or has beyond what is known of it: {', '.join(differing)}"
        return (_OfOneTower if suffixes == [""] else _OfAllTowers)(module, check, suffixes)

    return accelerate(model, "Cambrian's and LongVU's attentions", recognise)


@dataclass(frozen=True)
class _Tower:
    """Matrices of one tower: K channels, heads of D."""

    eps: float
    absorbed: Tensor  # [heads, D, K]: from a head's query to what is multiplied with normalised keys
    key_shift: Tensor  # [heads, D, 1]: what keys have in common
    value_weight: Tensor  # [heads, K, D]
    value_shift: Tensor  # [heads, D]


class _Attention(Replacement):
    def __init__(self, module: nn.Module, check: bool, suffixes: Sequence[str]) -> None:
        self.names = [f"{kind}_proj{suffix}" for suffix in suffixes for kind in "kv"]
        super().__init__(module, check, ["q_proj", "o_proj", *self.names])

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Projections of keys and values, of each tower in turn."""
        return [(name, self.module._modules[name]) for name in self.names]

    def why_not_these(self) -> str | None:
        heads = getattr(self.module, "num_heads", None)
        if not isinstance(heads, int) or heads < 1:
            return "it has no attribute num_heads"
        for name, layer in self.layers():
            if not is_plain(layer, nn.Sequential) or len(layer) != 2:
                return f"{name} is not a plain Sequential of LayerNorm and Linear"
            if not is_plain(layer[0], nn.LayerNorm) or layer[0].bias is None:
                return f"{name}[0] is not a plain LayerNorm with scale and shift, but {layer[0]}"
            if not is_plain(layer[1], nn.Linear) or layer[0].normalized_shape != (layer[1].in_features,):
                return f"{name}[1] is not a plain Linear of what {name}[0] normalises, but {layer[1]}"
            if layer[1].out_features % heads:
                return f"{name} has {layer[1].out_features} channels, no multiple of {heads} heads"
        keys, values = (self.layers()[first::2] for first in (0, 1))
        for (name, key), (_, value) in zip(keys, values, strict=True):
            if (key[0].eps, key[1].weight.shape) != (value[0].eps, value[1].weight.shape):
                return f"{name} and its values differ in eps or in size"
        return None

    def fitting(self, queries: Any, windows: Sequence[Any], masks: Sequence[Any]) -> tuple[Any, ...] | None:
        """The three, if they are what is known here."""
        if not all(isinstance(x, Tensor) and x.dim() == 3 for x in (queries, *windows)) or queries.shape[1] != 1:
            return None
        for (_, layer), window, mask in zip(self.layers()[::2], windows, masks, strict=True):
            batch, size, channels = window.shape
            if batch != len(queries) or channels != layer[1].in_features:
                return None
            if mask is None and len(masks) == 1:
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, 1, 1, size):
                return None
        return queries, windows, masks

    def compute(self, queries: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
        query = self.module.q_proj(queries)
        with without_autocast(query.device):
            attended = self._attend(query, windows, masks)
        return self.module.o_proj(attended)

    def _attend(self, query: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
        dtype, wide, heads = query.dtype, computing_dtype(query.dtype), self.module.num_heads
        parameters = [parameter for _, layer in self.layers() for parameter in layer.parameters()]
        towers = self.kept.get(parameters, (dtype, heads), lambda: self._fold(dtype))
        query = query.view(len(query), heads, -1).transpose(0, 1)  # [heads, B, D]
        scores, rows = [], []
        for tower, window in zip(towers, windows, strict=True):
            # One row for all heads, of keys and of values. Scores and sums are in float32 or better.
            rows.append(layer_norm(window.to(wide), window.shape[-1:], eps=tower.eps))
            absorbed = torch.matmul(query, tower.absorbed).transpose(0, 1)
            shift = torch.matmul(query.to(wide), tower.key_shift).transpose(0, 1)
            scores.append(torch.matmul(absorbed.to(wide), rows[-1].transpose(1, 2)) + shift)
        weights = _softmax(torch.cat(scores, -1), masks).split([window.shape[1] for window in windows], -1)
        pooled = [
            torch.matmul(torch.matmul(weight, row).to(dtype).transpose(0, 1), tower.value_weight)
            + weight.sum(-1, keepdim=True).transpose(0, 1) * tower.value_shift.unsqueeze(1)
            for weight, row, tower in zip(weights, rows, towers, strict=True)
        ]
        return sum(pooled).to(dtype).transpose(0, 1).flatten(1).unsqueeze(1)

    def _fold(self, dtype: torch.dtype) -> list[_Tower]:
        wide, heads = computing_dtype(dtype), self.module.num_heads
        layers = [layer for _, layer in self.layers()]
        towers = []
        for (key_norm, key), (value_norm, value) in zip(layers[::2], layers[1::2], strict=True):
            scale = (key.out_features // heads) ** -0.5
            key_weight, key_shift = _through_norm(key_norm, key, wide)
            value_weight, value_shift = _through_norm(value_norm, value, wide)
            towers.append(
                _Tower(
                    eps=key_norm.eps,
                    absorbed=(key_weight * scale).to(dtype).unflatten(0, (heads, -1)),
                    key_shift=(key_shift * scale).view(heads, -1, 1),
                    value_weight=value_weight.to(dtype).unflatten(0, (heads, -1)).transpose(1, 2),
                    value_shift=value_shift.view(heads, -1),
                )
            )
        return towers

    def describe(self) -> str:
        towers = self.layers()[::2]
        widths = ", ".join(str(layer[1].in_features) for _, layer in towers)
        return f"{len(towers)} tower{'s' * (len(towers) > 1)} of {widths} channels, {self.module.num_heads} heads"


class _OfOneTower(_Attention):
    def inputs(
        self, vision_latents: Any = None, queries: Any = None, attention_mask: Any = None, *more: Any, **other: Any
    ) -> tuple[Any, ...] | None:
        return None if more or other else self.fitting(queries, [vision_latents], [attention_mask])


class _OfAllTowers(_Attention):
    def inputs(self, *arguments: Any, **options: Any) -> tuple[Any, ...] | None:
        count = len(self.layers()) // 2
        if options or len(arguments) != 1 + 2 * count:
            return None
        return self.fitting(arguments[0], arguments[1 : 1 + count], arguments[1 + count :])


def _through_norm(norm: nn.LayerNorm, layer: nn.Linear, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias that do to bare normalised rows what both layers do."""
    weight = layer.weight.to(wide)
    shift = weight @ norm.bias.to(wide)
    return weight * norm.weight.to(wide), shift if layer.bias is None else shift + layer.bias.to(wide)


def _softmax(scores: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Over the keys that a mask `[B, 1, 1, n]` lets through; zeros where there is none."""
    if masks[0] is None:
        return scores.softmax(-1)
    mask = torch.cat(list(masks), -1)[:, 0]
    # Not -inf: its softmax, and the gradient through it, would be NaN where no key is seen.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0)
