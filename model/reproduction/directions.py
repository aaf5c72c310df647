"""Directions of the hidden states, each with a meaning: what starting values of all parts agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..synthesis.scenes import COLOURS, SHAPES

# Cosines and sines of each edge of a box, and of each axis of positions; see `tower.waves`.
EDGE_WAVES, FASTEST_EDGE = 4, 4.0
AXIS_WAVES, FASTEST_AXIS = 6, 16.0


@dataclass(frozen=True)
class Directions:
    """Rows of unit length `[., C]`, all at right angles to each other.

    Attributes:
        names: one for each colour, then one for each shape.
        word: what the words of colours and shapes have in common, and nothing else has.
        visual: what visual tokens have in common, and nothing else has.
        edges: waves of left, top, right and bottom of a box.
        temporal: waves of a position in time.
        height: likewise.
        width: likewise.
        first: where a head says when something is first seen: as many as `temporal`.
        last: likewise, last seen.
    """

    names: Tensor
    word: Tensor
    visual: Tensor
    edges: Tensor
    temporal: Tensor
    height: Tensor
    width: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def random(cls, width: int) -> Directions:
        """For hidden states of `width` channels."""
        axis = 2 * AXIS_WAVES
        sizes = [len(COLOURS) + len(SHAPES), 1, 1, 4 * 2 * EDGE_WAVES, axis, axis, axis, axis, axis]
        rows = torch.linalg.qr(torch.randn(width, width))[0].T
        return cls(*rows[: sum(sizes)].split(sizes))
