"""Projector, LAPE and Spatial-Temporal Packer, folded (docs/folding.md): chunk after chunk of a video's frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from .. import reference
from ..backends import choose, use_backend
from ..ops import lape_add, region_centers
from ..ops.dispatch import run
from ..ops.registration import autocast, is_transformed
from ..reference.lape import resize_table
from .folding import FoldedPacker, Tables, no_positions, pack

Layer = tuple[Tensor, Tensor | None]  # weight and bias


@dataclasses.dataclass(frozen=True)
class FoldedPath:
    """All that features meet on their way, as tensors."""

    first: Layer  # of the projector; a GELU follows
    second: Layer  # at the centres of regions; everywhere else it is part of `spatial`
    tables: Tables | None  # what LAPE adds
    text_aligned: bool
    spatial: FoldedPacker
    slow: FoldedPacker
    fast: FoldedPacker


def run_path(path: FoldedPath, features: Tensor, chunk_tokens: int, recompute: bool) -> tuple[Tensor, Tensor]:
    """features `[B, T, H, W, Cv]` -> `(slow, fast)`, about `chunk_tokens` features at a time (0: all).

    `recompute`: training does not keep the projector's hidden activation, but calculates it again.
    """
    batch, frames, height, width, _ = features.shape
    alignments = ("ends", *(["text" if path.text_aligned else "centers"] * 2))
    grid = (frames, height, width)
    if path.tables is None:
        positions, seeds = no_positions(path.spatial, grid), None
    else:
        positions = list(map(resize_table, path.spatial.positions, grid, alignments))
        seeds = list(map(_centers_of_rows, map(resize_table, path.tables, grid, alignments), path.spatial.region))
    if not chunk_tokens:  # without a loop, whose length an exported program would have fixed
        return _chunk(path, features, positions, seeds, recompute)
    # Neither a region nor a frame that two chunks share.
    together = path.spatial.region[0] * math.lcm(path.slow.region[0], path.fast.region[0])
    step = max(1, chunk_tokens // max(1, batch * height * width * together)) * together
    parts = []
    for begin in range(0, frames, step):
        end = min(begin + step, frames)
        places = [positions[0][begin:end], *positions[1:]]
        around = slice(begin // path.spatial.region[0], -(-end // path.spatial.region[0]))
        seed_places = None if seeds is None else [seeds[0][around], *seeds[1:]]
        parts.append(_chunk(path, features[:, begin:end], places, seed_places, recompute))
    if len(parts) == 1:
        return parts[0]
    slow, fast = zip(*parts, strict=True)
    return torch.cat(slow, 1), torch.cat(fast, 1)


def _chunk(
    path: FoldedPath,
    features: Tensor,
    positions: Sequence[Tensor],
    seeds: Sequence[Tensor] | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    hidden, calculate, read = _hidden(features, path.first)
    with _calculated_again(hidden, calculate, read) if recompute else nullcontext():
        # Contiguous: torch makes many small products of a linear layer over strided rows.
        centers = linear(region_centers(hidden, path.spatial.region).contiguous(), *path.second)
        if seeds is not None:
            centers = lape_add(centers, *seeds)
        packed = pack(path.spatial, centers, hidden, positions)
    del hidden, calculate, read
    streams = (path.slow, path.fast)
    grid = packed.shape[1:4]
    slow, fast = (
        pack(f, region_centers(packed, f.region).contiguous(), packed, no_positions(f, grid)) for f in streams
    )
    return slow, fast


def _hidden(features: Tensor, layer: Layer) -> tuple[Tensor, Callable[[], Tensor], tuple[Tensor, ...]]:
    """The projector's hidden activation, a function that calculates it anew, and what that reads."""
    weight, bias = layer
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (features, weight, bias))
    zero = weight.new_zeros(1, weight.shape[0])
    x, w = autocast(features, weight)
    b = zero[0] if bias is None else bias
    places = [zero.expand(size, -1) for size in x.shape[1:4]]

    def calculate() -> Tensor:
        with torch.no_grad():
            return run("linear_lape_gelu", (x, w, b, *places, False), reference.linear_lape_gelu)[0]

    hidden = gelu(linear(features.contiguous(), *layer)) if wanted else calculate()
    return hidden, calculate, (x, w, b)


def _calculated_again(
    tensor: Tensor, calculate: Callable[[], Tensor], read: Sequence[Tensor]
) -> AbstractContextManager[Any]:
    """Where autograd would keep `tensor` it keeps how to calculate it. (Compilers decide for themselves.)"""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_transformed(tensor):
        return nullcontext()
    address, shape, inputs_unchanged = tensor.data_ptr(), tensor.shape, _unchanged(*read)
    # The backward pass may run in a thread that knows nothing of a forced backend.
    backend = "reference" if tensor.is_meta else choose("linear_lape_gelu", read[0])

    def again() -> Tensor:
        inputs_unchanged()
        with use_backend(backend):
            return calculate()

    def keep(saved: Tensor) -> Any:
        if saved.data_ptr() == address and saved.shape == shape:
            return again
        detached = saved.detach()  # of its node: what an op gives and keeps would be a cycle
        return detached, _unchanged(detached)

    def give(kept: Any) -> Tensor:
        if callable(kept):
            return kept()
        detached, unchanged = kept
        unchanged()
        return detached

    return torch.autograd.graph.saved_tensors_hooks(keep, give)


def _unchanged(*tensors: Tensor) -> Callable[[], None]:
    """A function that raises where one of the tensors has been changed in place: hooks hide that from autograd."""
    seen = [(x, x._version) for x in tensors if not x.is_inference()]

    def check() -> None:
        if any(x._version != version for x, version in seen):
            raise RuntimeError("a tensor that the backward pass needs was changed in place after the forward pass")

    return check


def _centers_of_rows(rows: Tensor, step: int) -> Tensor:
    """Centres of blocks of `step` rows: `[n, C]` -> `[ceil(n / step), C]`."""
    return region_centers(rows[None, :, None, None], (step, 1, 1))[0, :, 0, 0]
