"""Point-to-region attention with a mask of keys, as padding and the aggregators of other models have it."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_st_ops import point_to_region_attention, reference

from . import parity
from .cases import BYTES_COUNTED, Case
from .clip import Clip, attention_inputs
from .peers import multiply_and_sum, sdpa
from .workloads import Workload, bytes_of, on_each_backend, workload_of

FRAMES, REGION = 40, (1, 3, 3)
BASELINE = "SDPA on permuted tensors"
MASKED = 0.25  # share of keys; those of the regions' centres stay


def masked_workload(mode: str, clip: Clip, device: torch.device, frames: int = FRAMES) -> Workload:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = Case(frames, REGION, dtype, mode, "a quarter of the keys is masked, all heads alike")
    heads, dim = case.key_shape[-2:]
    tensors = attention_inputs(clip, frames, REGION, heads, dim, dtype, device)
    generator = torch.Generator().manual_seed(8)
    keep = torch.rand(*case.key_shape[:4], 1, generator=generator) >= MASKED
    keep[:, :, 1::3, 1::3] = True
    bias = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).to(device, dtype)
    grad = torch.randn(tensors[0].shape, generator=generator).to(device, dtype)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return point_to_region_attention(query, key, value, REGION, bias=bias)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        each_head = bias.to(key).expand(key.shape[:-1])
        return reference.point_to_region_attention(query, key, value, REGION, bias=each_head)

    torch.compiler.reset()  # what was compiled for earlier cases
    compiled = torch.compile(multiply_and_sum, dynamic=False, fullgraph=True)
    sizes = [bytes_of(x) for x in tensors]
    return workload_of(
        {
            **case.describe(),
            "name": f"masked, {case.name}",
            "stream": "spatial, masked",
            "bytes_counted": f"{BYTES_COUNTED[mode]}; not the mask, one number for {heads * dim} of a key",
            "baseline": BASELINE,
        },
        parity.TENSORS,
        tensors,
        (grad,),
        plain,
        [
            *on_each_backend(ours, device, dtype),
            (BASELINE, "peer", lambda q, k, v: sdpa(q, k, v, REGION, bias)),
            ("multiply-and-sum, compiled", "peer", lambda q, k, v: compiled(q, k, v, REGION, bias)),
        ],
        [([*tensors], sizes[:1]), ([*tensors, grad], sizes)],
    )
