"""Attention heads that find in a video what a question names, before anything is learned.

A language model that has read much has heads that look up what was said before. A tiny one from nothing grows them in
millions of samples; in trials, some fifty thousand did not get it beyond chance. So these heads are there from the
start, as if pre-trained. They only say where to look: what answers are, and how what was found becomes one, is learned.
None of them is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .directions import AXIS_WAVES, Directions

# With such a base of RoPE, pairs of channels of a head from `_STILL` on hardly turn within a conversation, and carry
# meaning; those of `_LOCAL` turn, at different rates, so that equal ones say how near a token is.
ROPE_BASE = 1e8
HEAD_DIM = 64
_LOCAL, _STILL = range(2, 9), range(12, HEAD_DIM // 2)
_RANDOM = 0.05  # what is left of random queries and keys in such a head


class _Head:
    """One attention head to be."""

    def __init__(self, attention: nn.Module, number: int) -> None:
        self.parts = attention
        self.rows = slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)
        self.free = [row for pair in _STILL for row in (pair, pair + HEAD_DIM // 2)]
        self.copied = 0
        for part in (attention.q_proj, attention.k_proj):
            part.weight[self.rows] *= _RANDOM
        attention.v_proj.weight[self.rows] = 0
        attention.o_proj.weight[:, self.rows] = 0

    def _row(self) -> int:
        return self.rows.start + self.free.pop(0)

    def match(self, directions: Tensor, gain: float) -> _Head:
        """Looks for what is like itself in these directions."""
        for direction in directions:
            row = self._row()
            self.parts.q_proj.weight[row] = gain * direction
            self.parts.k_proj.weight[row] = gain * direction
        return self

    def prefer(self, direction: Tensor, gain: float) -> _Head:
        """Looks for what lies in a direction; `gain` is in units of the softmax."""
        row, root = self._row(), math.sqrt(gain * math.sqrt(HEAD_DIM))
        self.parts.q_proj.bias[row] = root
        self.parts.k_proj.weight[row] = root * direction
        return self

    def near(self, gain: float) -> _Head:
        """Looks for what is near; `gain` is of a token for itself."""
        root = math.sqrt(gain * math.sqrt(HEAD_DIM) / len(_LOCAL))
        for pair in _LOCAL:
            self.parts.q_proj.bias[self.rows.start + pair] = root
            self.parts.k_proj.bias[self.rows.start + pair] = root
        return self

    def copy(self, directions: Tensor, gain: float, to: Tensor | None = None) -> _Head:
        """Says what it finds in these directions, in the same or in others."""
        rows = slice(self.rows.start + self.copied, self.rows.start + self.copied + len(directions))
        self.parts.v_proj.weight[rows] = directions
        self.parts.o_proj.weight[:, rows] = gain * (directions if to is None else to).T
        self.copied += len(directions)
        return self


@torch.no_grad()
def wire(layers: Sequence[nn.Module], to: Directions) -> None:
    """Makes heads of the first three of a Qwen2's layers find what is asked for.

    1. Every token learns which colour and shape were named last, and which time.
    2. It finds the visual tokens of that name: all, those at that time, the first and the last ones.
    3. Once more, all.
    """
    slow_cosine, slow_sine = to.temporal[0], to.temporal[AXIS_WAVES]  # a quarter of a period: one falls, one rises
    a_time, early = (slow_cosine + slow_sine) / math.sqrt(2), (slow_cosine - slow_sine) / math.sqrt(2)
    said, found, again = (layer.self_attn for layer in layers[:3])
    _Head(said, 0).prefer(to.word[0], 1.6).near(5.0).copy(to.names, 0.7)
    _Head(said, 1).prefer(a_time - to.visual[0], 1.2).near(6.0).copy(to.temporal, 0.4)

    def finder(attention: nn.Module, number: int) -> _Head:
        return _Head(attention, number).match(to.names, 1.8).prefer(to.visual[0], 6.0)

    finder(found, 0).copy(to.edges, 0.5).copy(to.temporal, 0.3)
    finder(found, 1).match(to.temporal, 2.0).copy(to.edges, 0.5).copy(to.temporal, 0.3)
    finder(found, 2).prefer(early, 2.5).copy(to.temporal, 0.4, to.first)
    finder(found, 3).prefer(-early, 2.5).copy(to.temporal, 0.4, to.last)
    finder(again, 0).copy(to.edges, 0.5).copy(to.temporal, 0.3)
