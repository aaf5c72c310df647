"""Modules of other packages at their published sizes, before and after `llava_st_ops.integrations`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llava_st_ops import integrations

from . import integration_peers as peers
from .workloads import Call, Contender, Workload

BEFORE, AFTER = "eager, as published", "accelerated"


@dataclass(frozen=True)
class Case:
    """A module at its published sizes, what accelerates it, and the arguments of a call."""

    name: str
    make: Callable[[], nn.Module]
    accelerate: Callable[[nn.Module], integrations.Report]
    inputs: Callable[[], tuple[Any, ...]]


def _llava_st(name: str, temporal: bool, shape: tuple[int, int, int]) -> Case:
    attribute = "token_packer_slow" if temporal else "token_packer"  # packers are known by their names
    return Case(
        name,
        functools.partial(peers.LlavaStPacker, shape[-1], 1024, 8, temporal),
        lambda packer: integrations.accelerate_llava_st(nn.ModuleDict({attribute: packer})),
        lambda: (torch.randn(shape),),
    )


def _windows(queries: int, sides: Sequence[int], width: int) -> tuple[Tensor, ...]:
    """What a sampler's layer is called with; a tenth of the keys is not seen."""
    windows = [torch.randn(queries, side * side, width) for side in sides]
    masks = [torch.rand(queries, side, side) > 0.1 for side in sides]
    return torch.randn(queries, 1, width), torch.randn(queries, 1, width), *windows, *masks


def _sampler(name: str, queries: int, sides: Sequence[int], width: int = 1024) -> Case:
    return Case(
        name,
        lambda: peers.SamplerLayer(width, width, [width] * len(sides), sides, width),
        integrations.accelerate_vision_sampler,
        lambda: _windows(queries, sides, width),
    )


CASES = [
    _llava_st("LLaVA-ST, spatial packer, 3 frames of 27 x 27", False, (3, 729, 3584)),
    _llava_st("LLaVA-ST, temporal packer, 25 frames of 9 x 9", True, (25, 81, 3584)),
    *(
        Case(
            f"TokenPacker, scale {scale}, 2 images of 24 x 24",
            functools.partial(peers.TokenPackerProjector, 1024, 4096, 1024, 8, 4096, scale),
            integrations.accelerate_token_packer,
            lambda: ((torch.randn(2, 576, 1024), torch.randn(2, 576, 4096)),),
        )
        for scale in (2, 3, 4)
    ),
    *(
        Case(
            f"Oryx, {kind}, 16 frames of 24 x 32",
            functools.partial(peers.OryxCompressor, 1152),
            integrations.accelerate_oryx,
            functools.partial(lambda kind: (torch.randn(16, 24 * 32, 1152), kind, (24, 32)), kind),
        )
        for kind in ("video", "video_long")
    ),
    _sampler("Cambrian, 144 queries, windows 1, 1, 1 and 16", 144, (1, 1, 1, 4)),
    _sampler("LongVU, 144 queries, windows 4 and 4", 144, (2, 2)),
]


def integration_workload(case: Case, mode: str, device: torch.device) -> Workload:
    """Backward: the gradients of all parameters and of the features; compared are the latter."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backward = mode != "forward"
    torch.manual_seed(0)
    before = case.make().to(device, dtype)
    after = copy.deepcopy(before)
    report = case.accelerate(after)
    if len(report.replaced) != 1:
        raise RuntimeError(f"expected one module to be replaced: {report}")
    inputs = _map(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), case.inputs())
    with torch.no_grad():
        grad = torch.randn_like(_first(before(*inputs)))

    def call(module: nn.Module, inputs: Any, grad: Tensor) -> Call:
        if not backward:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (_first(module(*inputs)),)

            return forward
        inputs = _map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)
        features = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]

        def forward_and_backward() -> tuple[Tensor, ...]:
            output = _first(module(*inputs))
            return output.detach(), *torch.autograd.grad(output, [*features, *module.parameters()], grad)

        return forward_and_backward

    def truth() -> dict[str, Tensor]:
        exact = _map(lambda x: x.double() if x.is_floating_point() else x, inputs)
        results = call(copy.deepcopy(before).double(), exact, grad.double())()
        count = len(results) - len(list(before.parameters())) if backward else 1
        return {("output" if i == 0 else f"grad_input_{i}"): x for i, x in enumerate(results[:count])}

    dtype_name = str(dtype).removeprefix("torch.")
    return Workload(
        description={
            "name": f"{case.name}, {mode}",
            "kind": "integration",
            "mode": mode,
            "dtype": dtype_name,
            "reason": "the published sizes",
            "baseline": BEFORE,
        },
        contenders=[
            Contender(AFTER, "ours", call(after, inputs, grad)),
            Contender(BEFORE, "peer", call(before, inputs, grad)),
        ],
        truth=truth,
        reference=BEFORE,
        passes=[],
        dtype=dtype,
    )


def _map(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs)


def _first(outputs: Any) -> Tensor:
    return tree_leaves(outputs)[0]
