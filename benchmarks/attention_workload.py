"""Point-to-region attention of a clip: ours and all peers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import parity
from .cases import HEAD_DIM, HEADS, Case
from .clip import Clip, attention_inputs
from .peers import Implementation, implementations
from .workloads import REFERENCE, Contender, Workload, call_of, seeded


# The forward case and the one with the backward pass follow each other and share tensors and truth.
@functools.lru_cache(maxsize=1)
def _tensors(
    clip: Clip, frames: int, region: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """query, key and value, and a gradient of the output."""
    inputs = list(attention_inputs(clip, frames, region, HEADS, HEAD_DIM, dtype, device))
    return inputs, seeded(tuple(inputs[0].shape), 4, dtype, device)


@functools.lru_cache(maxsize=1)
def _truth(
    clip: Clip, frames: int, region: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    inputs, grad_output = _tensors(clip, frames, region, dtype, device)
    return parity.truth(*inputs, grad_output, region)


def attention_workload(case: Case, clip: Clip, device: torch.device) -> Workload:
    key = (clip, case.frames, case.region, case.dtype, device)
    tensors, grad_output = _tensors(*key)
    backward = case.mode != "forward"
    inputs = [x.detach().requires_grad_(backward) for x in tensors]

    def contender(way: Implementation) -> Contender:
        if way.attention is None:
            return Contender(way.name, way.role, None, way.reason)
        call = call_of(way.attention, inputs, inputs, (grad_output,) if backward else None)
        return Contender(way.name, way.role, call)

    def truth() -> dict[str, Tensor]:
        found = _truth(*key)
        return found if backward else {"output": found["output"]}

    tensors_read = [tensors, [*tensors, grad_output]]
    return Workload(
        description=case.describe(),
        contenders=[contender(way) for way in implementations(case, device)],
        truth=truth,
        reference=REFERENCE,
        passes=[(read, written) for read, (_, written) in zip(tensors_read, case.passes(), strict=False)],
        dtype=case.dtype,
    )
