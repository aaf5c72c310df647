"""Point-to-region attention with a mask of keys, as padding and the aggregators of other models have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llava_st_ops
from llava_st_ops import reference, use_backend

from .cases import BYTES_COUNTED, Case
from .clip import Clip, attention_inputs
from .peers import available_backends, split
from .workloads import Contender, Workload, call_of

MODES = ("forward", "forward+backward")
FRAMES, REGION = 40, (1, 3, 3)
BASELINE = "SDPA on permuted tensors"
MASKED = 0.25  # share of keys; those of the regions' centres stay


def masked_workload(mode: str, clip: Clip, device: torch.device, frames: int = FRAMES) -> Workload:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backward = mode != "forward"
    case = Case(frames, REGION, dtype, mode, "a quarter of the keys is masked, all heads alike")
    heads, dim = case.key_shape[-2:]
    tensors = attention_inputs(clip, frames, REGION, heads, dim, dtype, device)
    inputs = [x.detach().requires_grad_(backward) for x in tensors]
    generator = torch.Generator().manual_seed(8)
    keep = torch.rand(*case.key_shape[:4], 1, generator=generator) >= MASKED
    keep[:, :, 1::3, 1::3] = True
    bias = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).to(device, dtype)
    grad = torch.randn(inputs[0].shape, generator=generator).to(device, dtype)

    def call(attention: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return call_of(lambda q, k, v: attention(q, k, v, bias), inputs, inputs, (grad,) if backward else None)

    def truth() -> dict[str, Tensor]:
        exact = [x.detach().double().requires_grad_(backward) for x in inputs]
        attend = call_of(_reference, [*exact, bias.double()], exact, (grad.double(),) if backward else None)
        return dict(zip(("output", "grad_query", "grad_key", "grad_value"), attend(), strict=False))

    torch.compiler.reset()  # what was compiled for earlier cases
    ours = [name for name, reason in available_backends(device, dtype).items() if not reason]
    sizes = [x.numel() * x.element_size() for x in tensors]
    passes = [([*tensors], sizes[:1]), ([*tensors, grad], sizes)][: 2 if backward else 1]
    return Workload(
        description={
            **case.describe(),
            "name": f"masked, {case.name}",
            "stream": "spatial, masked",
            "bytes_counted": f"{BYTES_COUNTED[mode]}; not the mask, one number for {heads * dim} of a key",
            "baseline": BASELINE,
        },
        contenders=[
            *(Contender(f"llava_st_ops, {name}", "ours", call(_on_backend(name))) for name in ours),
            Contender("reference, PyTorch", "reference", call(_reference)),
            Contender(BASELINE, "peer", call(_sdpa)),
            Contender("multiply-and-sum, compiled", "peer", call(torch.compile(_multiply_and_sum, dynamic=False))),
        ],
        truth=truth,
        reference="reference, PyTorch",
        passes=passes,
        dtype=dtype,
    )


def _on_backend(backend: str) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        with use_backend(backend):
            return llava_st_ops.point_to_region_attention(query, key, value, REGION, bias=bias)

    return attention


def _reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return reference.point_to_region_attention(query, key, value, REGION, bias=bias.expand(key.shape[:-1]))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """scaled_dot_product_attention with one batch entry per region."""
    heads, dim = query.shape[-2:]

    def gather(x: Tensor) -> Tensor:
        return split(x, REGION).permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, x.shape[-2], 9, x.shape[-1])

    mask = gather(bias[..., None]).transpose(2, 3)  # [regions, 1, 1, keys]
    q = query.reshape(-1, heads, 1, dim)
    return torch.nn.functional.scaled_dot_product_attention(q, gather(key), gather(value), mask).view(query.shape)


def _multiply_and_sum(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Broadcast products and sums, for torch.compile."""
    query = (query * query.shape[-1] ** -0.5).unsqueeze(4).unsqueeze(3).unsqueeze(2)
    scores = (query * split(key, REGION)).sum(-1, keepdim=True) + split(bias[..., None], REGION)
    inside = (2, 4, 6)
    weights = (scores - scores.amax(inside, keepdim=True)).exp()
    return (weights / weights.sum(inside, keepdim=True) * split(value, REGION)).sum(inside)
