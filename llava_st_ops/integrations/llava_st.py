"""LLaVA-ST's packers, as published: three instances of one module, of a spatial and a temporal pattern."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..nn.foldable import is_plain
from ..ops import region_centers
from .region_packer import Parts, Region, attend, tensors_given
from .replacement import Replacement, Report, accelerate

_INNER = "devide_attention"  # spelled so
_LAYERS = ("to_q", "to_k", "to_v", "ln_q", "ln_k", "ln_v", "attn", "to_out")
_SPATIAL, _TEMPORAL = (1, 3, 3), (5, 1, 1)
_REGIONS = {"token_packer": _SPATIAL, "token_packer_slow": _TEMPORAL, "token_packer_fast": _SPATIAL}


def accelerate_llava_st(model: nn.Module, *, check: bool = True) -> Report:
    """Replaces the forward of the published LLaVA-ST packers in a model by one that computes the same, faster.

    Known by their names (`token_packer`, `token_packer_slow`, `token_packer_fast`) and by the layers below their
    `devide_attention`; nothing of the published package is imported. Features `[T, H W, C]` on a square grid become
    `[T, H W / 9, C]` (spatial) or `[T / 5, H W, C]` (temporal; a single frame stays one). Float32, bfloat16, float16,
    on a CPU float64; inference and training, autocast, torch.compile. Parameters, buffers and the state dict stay as
    they are.

    Args:
        model: any module with the packers somewhere in it. Changed in place.
        check: compare the first result of each packer with that of its own forward, once, and leave that in its place
            where they differ.

    Returns:
        What was replaced and what was skipped, with reasons. `undo()`, or the end of a `with` block, takes all back.

    Raises:
        TypeError: model is not a module.

    Source: LLaVA-ST (arXiv:2501.08282), Spatial-Temporal Packer.
    """

    def recognise(name: str, module: nn.Module) -> Replacement | str | None:
        inner = module._modules.get(_INNER)
        if inner is None or "attn" not in inner._modules:
            return None
        if missing := [layer for layer in _LAYERS if layer not in inner._modules]:
            return f"{_INNER} lacks {', '.join(missing)}"
        own = [part for part in (*module._modules, *module._parameters) if part != _INNER]
        own += [part for part in (*inner._modules, *inner._parameters) if part not in _LAYERS]
        if own:
            return f"it has more than is known of it: {', '.join(own)}"
        region = _REGIONS.get(name.rpartition(".")[2])
        if region is None:
            return f"of which pattern it is, its name does not tell; known are {', '.join(_REGIONS)}"
        return _Packer(module, check, region)

    return accelerate(model, "LLaVA-ST's packers", recognise)


class _Packer(Replacement):
    def __init__(self, module: nn.Module, check: bool, region: Region) -> None:
        super().__init__(module, check, [_INNER, *(f"{_INNER}.{layer}" for layer in _LAYERS)])
        self.region = region
        self.kind = type(getattr(module, _INNER))

    def parts(self) -> Parts:
        return Parts(*(getattr(self.module, _INNER)._modules[layer] for layer in _LAYERS[:-1]))

    def why_not_these(self) -> str | None:
        if not is_plain(getattr(self.module, _INNER), self.kind):
            return f"{_INNER} has hooks or another forward"
        return self.parts().why_not_folded()

    def inputs(self, *arguments: Any, **options: Any) -> tuple[Tensor] | None:
        tensors = tensors_given(arguments, options)
        if tensors is None or len(tensors) != 1 or tensors[0].dim() != 3:
            return None
        frames, tokens, width = tensors[0].shape
        side = math.isqrt(tokens)
        if width != self.parts().key_mlp[0].in_features or side * side != tokens or 0 in (frames, tokens):
            return None
        whole = side % 3 == 0 if self.region == _SPATIAL else frames % 5 == 0 or frames == 1
        return (tensors[0],) if whole else None

    def compute(self, features: Tensor) -> Tensor:
        side = math.isqrt(features.shape[1])
        grid = features.unflatten(1, (side, side)).unsqueeze(0)
        centers = region_centers(grid, self.region).contiguous()
        attended = attend(self.parts(), self.kept, centers, grid, self.region)
        return (centers + getattr(self.module, _INNER).to_out(attended))[0].flatten(1, 2)

    def describe(self) -> str:
        parts = self.parts()
        pattern = "spatial, 3 x 3 tokens" if self.region == _SPATIAL else "temporal, 5 frames"
        return f"{pattern}, {parts.key_mlp[0].in_features} channels, {parts.num_heads} heads"
