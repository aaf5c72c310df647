"""What training keeps from the forward to the backward pass for every raw token, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .clip import GRID
from .path_published import PublishedPath, tokenizer_like

FRAMES = 5


def ways(*sizes: int) -> dict[str, Callable[[], nn.Module]]:
    """The path in each execution, by name; `sizes` are those of `PublishedPath`."""

    def ours(**options: object) -> Callable[[], nn.Module]:
        return lambda: tokenizer_like(PublishedPath(*sizes), **options)

    return {
        "published": lambda: PublishedPath(*sizes),
        "folded": ours(execution="folded", chunk_tokens=0),
        "folded, recompute": ours(execution="folded", chunk_tokens=0, recompute=True),
    }


def kept_channels(make: Callable[[], nn.Module], vision_dim: int) -> int:
    """How many numbers are kept per raw token; what is kept per region or in all is left out."""
    tokens = FRAMES * GRID * GRID
    with torch.device("meta"):
        module = make()
        features = torch.empty(1, FRAMES, GRID, GRID, vision_dim)
    own = {tensor.untyped_storage()._cdata for tensor in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if saved.numel() % tokens == 0 and storage._cdata not in own:
            alive.append(saved)  # so that no other tensor gets its identity
            kept[storage._cdata] = max(kept.get(storage._cdata, 0), saved.numel())
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks

    def inner(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        """Hooks of the module itself, which would otherwise hide from ours what they keep."""

        def pack_and_count(saved: Tensor) -> Any:
            packed = pack(saved)
            if not callable(packed):
                keep(saved)
            return packed

        return hooks(pack_and_count, unpack)

    with hooks(keep, lambda saved: saved), mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", inner):
        outputs = module(features)
    del outputs
    return sum(kept.values()) // tokens
