"""Point-to-region attention on the emulated CUDA kernels, as differentiable functions of torch tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulator.build import load

_GUARD = 64  # elements on either side of a result that nobody may write; a multiple of every alignment


class Poisoned:
    """A contiguous result that holds NaN until it is written, between guards that must stay NaN."""

    def __init__(self, like: Tensor) -> None:
        self.memory = torch.full((like.numel() + 2 * _GUARD,), math.nan, dtype=like.dtype)
        self.tensor = self.memory[_GUARD : _GUARD + like.numel()].view(like.shape)

    def checked(self) -> Tensor:
        assert self.memory[:_GUARD].isnan().all(), "a kernel wrote before its result"
        assert self.memory[self.memory.numel() - _GUARD :].isnan().all(), "a kernel wrote past its result"
        return self.tensor


class _EmulatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        assert all(x.stride(-1) == 1 or x.shape[-1] <= 1 for x in (query, key, value)), (
            "the launchers copy such tensors"
        )
        output = Poisoned(query)
        load().forward(query, key, value, output.tensor, *others)
        ctx.save_for_backward(query, key, value)
        ctx.others = others
        return output.checked()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        grads = [Poisoned(x) for x in inputs]
        load().backward(grad_output, *inputs, *(grad.tensor for grad in grads), *ctx.others)
        return (*(grad.checked() for grad in grads), *(None for _ in ctx.others))


def emulated(region: Sequence[int], scale: float | None = None, grid_thw: Tensor | None = None, **run: int) -> Any:
    """A function of query, key and value. `run` takes `seed` and `max_blocks`."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        factor = scale if scale is not None else 1 / math.sqrt(max(query.shape[-1], 1))
        return _EmulatedAttention.apply(query, key, value, grid_thw, list(region), factor, load().Run(**run))

    return function
