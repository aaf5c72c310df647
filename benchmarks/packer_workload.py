"""The Spatial-Temporal Packer of a clip, against the published modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llava_st_ops

from . import packer_published
from .cases import HEADS
from .clip import Clip, patch_features
from .workloads import Call, Contender, Workload, call_of


def packer_workload(mode: str, clip: Clip, device: torch.device, dtype: torch.dtype) -> Workload:
    """The whole Spatial-Temporal Packer, projections included, against the published modules with the same weights."""
    gpu = device.type == "cuda"
    frames, visual_dim, embed_dim = (100, 3584, 1024) if gpu else (5, 256, 1024)
    reason = (
        "LLaVA-ST's own sizes"
        if gpu
        else "LLaVA-ST's attention width and heads, but 5 of its 100 frames and 256 of its 3584 features, "
        "which a CPU can afford"
    )
    published = packer_published.seeded(visual_dim, embed_dim, HEADS)
    ours = {}
    for execution in ("folded", "direct"):
        packer = llava_st_ops.nn.SpatialTemporalPacker(visual_dim, embed_dim, HEADS, execution=execution)
        packer.load_state_dict(published.state_dict())
        ours[f"llava_st_ops.nn packer, {execution}"] = packer.to(device, dtype)
    published = published.to(device, dtype)
    backward = mode != "forward"
    features = patch_features(clip, frames, visual_dim, device).to(dtype).requires_grad_(backward)
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, frames // 5, 9, 9, visual_dim), (1, frames, 3, 3, visual_dim)]
    grads = tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)

    def call(module: torch.nn.Module, inputs: Tensor, given: tuple[Tensor, ...]) -> Call:
        return call_of(module, [inputs], [inputs, *module.parameters()], given if backward else None)

    def truth() -> dict[str, Tensor]:
        exact = copy.deepcopy(published).double()
        inputs = features.detach().double().requires_grad_(backward)
        results = call(exact, inputs, tuple(g.double() for g in grads))()
        # Gradients of the weights are timed; compared is that of the features, which runs through all of them.
        return dict(zip(("slow", "fast", "grad_features"), results, strict=False))

    dtype_name = str(dtype).removeprefix("torch.")
    baseline = "published packer, eager"
    description = {
        "name": f"packer {frames} frames, visual_dim {visual_dim}, {mode}, {dtype_name}",
        "kind": "packer",
        "frames": frames,
        "dtype": dtype_name,
        "mode": mode,
        "features_shape": list(features.shape),
        "embed_dim": embed_dim,
        "heads": HEADS,
        "reason": reason,
        "flops": _flops(visual_dim, embed_dim, tuple(features.shape), backward),
        "flops_counted": "matrix products of the published way, by torch.utils.flop_counter",
        "baseline": baseline,
    }
    return Workload(
        description=description,
        contenders=[
            *(Contender(name, "ours", call(packer, features, grads)) for name, packer in ours.items()),
            Contender(baseline, "peer", call(published, features, grads)),
        ],
        truth=truth,
        reference=baseline,
        passes=[],
        dtype=dtype,
    )


def _flops(visual_dim: int, embed_dim: int, shape: tuple[int, ...], backward: bool) -> int:
    with torch.device("meta"):
        module = packer_published.PublishedSpatialTemporalPacker(visual_dim, embed_dim, HEADS)
        features = torch.empty(shape, requires_grad=backward)
    with FlopCounterMode(display=False) as counter:
        outputs = module(features)
        if backward:
            sum(output.sum() for output in outputs).backward()  # the counter cannot follow torch.autograd.grad
    return counter.get_total_flops()
