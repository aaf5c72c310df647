"""What a case runs: the calls to compare, what they should return, and the bytes for the floor."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llava_st_ops

from . import packer_published, parity
from .cases import HEAD_DIM, HEADS, Case
from .clip import Clip, attention_inputs, patch_features
from .peers import Implementation, implementations

Call = Callable[[], tuple[Tensor, ...]]


@dataclass
class Contender:
    """One implementation of a workload: a call, or the reason why there is none."""

    name: str
    role: str  # "ours", "reference", "peer", or "yardstick": what shows how fast the machine is
    call: Call | None
    reason: str = ""
    checked: bool = True  # whether its results are compared; a yardstick has none to compare


@dataclass
class Workload:
    """Everything that the runner needs for one case."""

    description: dict[str, object]  # of the case, for the record
    contenders: list[Contender]
    truth: Callable[[], dict[str, Tensor]]  # float64; named in the order in which the calls return tensors
    reference: str  # the contender whose error the others' are compared with
    passes: list[tuple[list[Tensor], list[int]]]  # inputs read and output bytes written, for the floor; may be empty
    dtype: torch.dtype
    rounds: int | None = None  # fewer than usual, where a single call takes many seconds

    @property
    def name(self) -> str:
        return str(self.description["name"])

    @property
    def baseline(self) -> str:
        return str(self.description["baseline"])


def call_of(
    function: Callable[..., object],
    inputs: Sequence[Tensor],
    differentiated: Sequence[Tensor],
    grads: tuple[Tensor, ...] | None,
) -> Call:
    """A call of `function(*inputs)`, followed by the gradients of `differentiated` where `grads` is given."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, differentiated, grads)
        return (*(output.detach() for output in outputs), *gradients)

    return forward if grads is None else forward_and_backward


# The forward case and the one with the backward pass follow each other and share tensors and truth.
@functools.lru_cache(maxsize=1)
def _tensors(
    clip: Clip, frames: int, region: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """query, key and value, and a gradient of the output."""
    inputs = list(attention_inputs(clip, frames, region, HEADS, HEAD_DIM, dtype, device))
    generator = torch.Generator().manual_seed(4)
    return inputs, torch.randn(inputs[0].shape, generator=generator).to(device, dtype)


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
        reference="reference, PyTorch",
        passes=[(read, written) for read, (_, written) in zip(tensors_read, case.passes(), strict=False)],
        dtype=case.dtype,
    )


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
