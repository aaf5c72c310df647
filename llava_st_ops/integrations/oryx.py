"""Oryx's compressor: each region's mean attends, in a single head, to the un-projected features of its region."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear

from ..nn.foldable import is_plain
from ..nn.folding import with_zero_gradient
from ..ops import point_to_region_attention
from ..ops.checks import MAX_HEAD_DIM
from .replacement import Replacement, Report, accelerate

_QUERY, _KEY = "vlm_query_projector", "vlm_key_projector"
_SIDES = {"video": 2, "video_long": 4, "image": 1, "text": 1}  # of a region, by the call's `forward_type`


def accelerate_oryx(model: nn.Module, *, check: bool = True) -> Report:
    """Replaces the forward of Oryx's `DynamicCompressor` in a model by one that computes the same, faster.

    Known by its two layers, `vlm_query_projector` and `vlm_key_projector`, and none besides. Called with features
    `[T, H W, C]`, the kind of the input ("video": regions of 2 x 2 tokens, "video_long": 4 x 4, "image" and "text":
    1 x 1) and the grid `(H, W)`, square by default, it gives `[T, H' W', C]` and `(H', W')`. Keys are not projected:
    the queries are taken to where features are. A NaN among features makes all channels of its region NaN. Dtypes,
    training, autocast, compiling, state dict: as in `accelerate_llava_st`.

    Args:
        model: any module with the compressor somewhere in it. Changed in place.
        check: compare the first result with that of the module's own forward, once, and leave that in its place where
            they differ.

    Returns:
        What was replaced and what was skipped, with reasons. `undo()`, or the end of a `with` block, takes all back.

    Raises:
        TypeError: model is not a module.

    Source: Oryx (arXiv:2409.12961), dynamic compressor.
    """

    def recognise(name: str, module: nn.Module) -> Replacement | str | None:
        if _QUERY not in module._modules or _KEY not in module._modules:
            return None
        if more := [part for part in (*module._modules, *module._parameters) if part not in (_QUERY, _KEY)]:
            return f"it has more than is known of it: {', '.join(more)}"
        return _Compressor(module, check, (_QUERY, _KEY))

    return accelerate(model, "Oryx's compressors", recognise)


class _Compressor(Replacement):
    def why_not_these(self) -> str | None:
        query, key = (self.module._modules[name] for name in (_QUERY, _KEY))
        for name, layer in ((_QUERY, query), (_KEY, key)):
            if not is_plain(layer, nn.Linear):
                return f"{name} is not a plain Linear, but {type(layer).__name__}"
        if query.weight.shape != key.weight.shape:
            return f"its projections differ in size, {list(query.weight.shape)} and {list(key.weight.shape)}"
        if key.in_features > MAX_HEAD_DIM:
            return f"features have {key.in_features} channels, more than {MAX_HEAD_DIM}"
        return None

    def inputs(
        self,
        image_features: Any = None,
        forward_type: Any = None,
        image_size: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> tuple[Tensor, int, tuple[int, int]] | None:
        weight = self.module.vlm_key_projector.weight
        side = _SIDES.get(forward_type) if isinstance(forward_type, str) else None
        if arguments or options or side is None or not isinstance(image_features, Tensor):
            return None
        if image_features.dim() != 3 or image_features.shape[-1] != weight.shape[1] or not image_features.numel():
            return None
        tokens = image_features.shape[1]
        height, width = (math.isqrt(tokens),) * 2 if image_size is None else map(int, image_size)
        fits = height * width == tokens and height % side == 0 and width % side == 0
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        # The model may be spread over devices; and what attends to itself alone gives its parameters zeros.
        if not fits or image_features.device != weight.device or (side == 1 and trains):
            return None
        return image_features, side, (height, width)

    def compute(self, features: Tensor, side: int, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        if side == 1:
            return features + features, size
        query_layer, key_layer = self.module.vlm_query_projector, self.module.vlm_key_projector
        grid = features.unflatten(1, size)
        pooled = avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        query = query_layer(pooled)
        if key_layer.bias is not None:  # the same for all keys, which the softmax does not see
            query = with_zero_gradient(query, key_layer.bias)
        absorbed = linear(query, key_layer.weight.t())
        keys = grid[:, None, :, :, None]  # [T, 1, H, W, 1, C]; values are the same
        scale = query.shape[-1] ** -0.5
        attended = point_to_region_attention(absorbed[:, None, :, :, None], keys, keys, (1, side, side), scale)
        return (pooled + attended[:, 0, :, :, 0]).flatten(1, 2), (size[0] // side, size[1] // side)

    def describe(self) -> str:
        channels, mid = self.module.vlm_key_projector.in_features, self.module.vlm_key_projector.out_features
        return f"regions of 2 x 2 and 4 x 4 tokens, {channels} channels, one head of {mid}"
