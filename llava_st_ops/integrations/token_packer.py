"""TokenPacker's projector: a coarse grid's queries attend to their regions of a fine grid, then an MLP."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn

from ..nn.foldable import is_plain
from ..ops import region_centers
from .region_packer import Parts, attend, tensors_given
from .replacement import Replacement, Report, accelerate

_ROLES = {"q": "query", "query": "query", "k": "key", "key": "key", "v": "value", "value": "value"}


def accelerate_token_packer(model: nn.Module, *, scale: int | None = None, check: bool = True) -> Report:
    """Replaces the forward of TokenPacker's projector in a model by one that computes the same, faster.

    Known by its layers: of query, key and value each a projection and a LayerNorm with that word, or its first letter,
    in the name (`k_proj`, `ln_k_1`); one torch.nn.MultiheadAttention; one more MLP to the language model's width. Two
    tensors come in, as two arguments or as a pair: what queries are made of, `[N, H W, Cq]`, then what keys and values
    are made of, `[N, H W, Ck]`, on square grids; `[N, H W / scale^2, C]` comes out. Dtypes, training, autocast,
    compiling, state dict: as in `accelerate_llava_st`.

    Args:
        model: any module with the projector somewhere in it. Changed in place.
        scale: side of the regions (2, 3 and 4 are published); by default the module's one integer attribute with
            "scale" in its name.
        check: compare the first result with that of the module's own forward, once, and leave that in its place where
            they differ.

    Returns:
        What was replaced and what was skipped, with reasons. `undo()`, or the end of a `with` block, takes all back.

    Raises:
        TypeError: model is not a module.
        ValueError: scale is not a positive integer.

    Source: TokenPacker (arXiv:2407.02392).
    """
    if scale is not None and (not isinstance(scale, int) or scale < 1):
        raise ValueError(f"scale must be a positive integer, got {scale!r}")

    def recognise(name: str, module: nn.Module) -> Replacement | str | None:
        roles = _layers_by_role(module)
        if roles is None:
            return None
        if isinstance(roles, str):
            return roles
        region_side = scale or _scale_of(module)
        if region_side is None:
            return "its scale is not known: no one integer attribute has `scale` in its name; pass scale="
        return _Projector(module, check, roles, region_side)

    return accelerate(model, "TokenPacker's projectors", recognise)


def _layers_by_role(module: nn.Module) -> dict[str, str] | str | None:
    """The names of a projector's layers; what speaks against it; None where it does not look like one."""
    found: dict[str, list[str]] = {}
    for name, layer in module._modules.items():
        words = re.split(r"[^a-z]+", name.lower())
        roles = {_ROLES[word] for word in words if word in _ROLES}
        if isinstance(layer, nn.MultiheadAttention):
            role = "attention"
        elif len(roles) == 1:
            role = f"{roles.pop()}_{'norm' if isinstance(layer, nn.LayerNorm) else 'layers'}"
        elif isinstance(layer, nn.Sequential):
            role = "mlp"
        else:
            role = "other"
        found.setdefault(role, []).append(name)
    needed = [f"{role}_{part}" for role in ("query", "key", "value") for part in ("layers", "norm")]
    if any(role not in found for role in (*needed, "attention")):
        return None
    rest = [", ".join(names) for role, names in found.items() if role == "other" or len(names) > 1]
    if rest or module._parameters:
        return f"it has more than is known of it: {', '.join((*rest, *module._parameters))}"
    if "mlp" not in found:
        return "no MLP follows its attention"
    return {role: names[0] for role, names in found.items()}


def _scale_of(module: nn.Module) -> int | None:
    scales = {value for name, value in vars(module).items() if "scale" in name.lower() and type(value) is int}
    return scales.pop() if len(scales) == 1 and min(scales) > 0 else None


class _Projector(Replacement):
    def __init__(self, module: nn.Module, check: bool, roles: dict[str, str], scale: int) -> None:
        super().__init__(module, check, list(roles.values()))
        self.roles = roles
        self.region = (1, scale, scale)

    def layer(self, role: str) -> nn.Module:
        return self.module._modules[self.roles[role]]

    def parts(self) -> Parts:
        roles = ("query_layers", "key_layers", "value_layers", "query_norm", "key_norm", "value_norm", "attention")
        return Parts(*map(self.layer, roles))

    def widths(self) -> tuple[int, int]:
        """Of what queries, and what keys and values are made of."""
        query = self.layer("query_layers")
        first = query[0] if isinstance(query, nn.Sequential) else query
        return first.in_features, self.layer("key_layers")[0].in_features

    def why_not_these(self) -> str | None:
        parts = self.parts()
        query = parts.query_layers
        first = query[0] if isinstance(query, nn.Sequential) and len(query) else query
        if not isinstance(first, nn.Linear):
            return f"queries are not made by linear layers, but by {type(first).__name__}"
        if not is_plain(parts.query_norm, nn.LayerNorm):
            return "query_norm is not a plain LayerNorm"
        return parts.why_not_folded()

    def inputs(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor] | None:
        tensors = tensors_given(arguments, options)
        if tensors is None or len(tensors) != 2 or any(x.dim() != 3 for x in tensors):
            return None
        if (tensors[0].shape[-1], tensors[1].shape[-1]) != self.widths():
            return None
        side = math.isqrt(tensors[0].shape[1])
        fits = tensors[0].shape[:2] == tensors[1].shape[:2] and tensors[0].shape[1] == side * side
        return tuple(tensors) if fits and side and side % self.region[1] == 0 else None

    def compute(self, coarse: Tensor, fine: Tensor) -> Tensor:
        side = math.isqrt(coarse.shape[1])
        coarse, fine = (x.unflatten(1, (1, side, side)) for x in (coarse, fine))
        centers = region_centers(coarse, self.region).contiguous()
        attended = attend(self.parts(), self.kept, centers, fine, self.region)
        return self.layer("mlp")(attended.flatten(1, 3))

    def describe(self) -> str:
        query, key = self.widths()
        return f"scale {self.region[1]}, {query} and {key} channels, {self.parts().num_heads} heads"
