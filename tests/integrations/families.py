"""Small modules of every family that can be accelerated, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import integration_peers as peers
from llava_st_ops import integrations


@dataclass(frozen=True)
class Family:
    """`inputs` gives the arguments of a call; tensors of a floating point dtype among them are differentiated."""

    make: Callable[[], nn.Module]
    accelerate: Callable[..., integrations.Report]
    inputs: Callable[[], tuple[Any, ...]]
    replaced: int


def _masks(*shapes: tuple[int, ...]) -> list[Tensor]:
    """With one query that sees no key at all."""
    masks = [torch.rand(shape) > 0.3 for shape in shapes]
    for mask in masks:
        mask[2] = False
    return masks


def _token_packer(scale: int) -> Family:
    return Family(
        lambda: peers.TokenPackerProjector(24, 64, 32, 4, 40, scale),
        integrations.accelerate_token_packer,
        lambda: ((torch.randn(2, 144, 24), torch.randn(2, 144, 64)),),
        replaced=1,
    )


def _oryx(kind: str) -> Family:
    return Family(
        lambda: peers.OryxCompressor(48, 16),
        integrations.accelerate_oryx,
        lambda: (torch.randn(3, 8 * 12, 48), kind, (8, 12)),
        replaced=1,
    )


FAMILIES = {
    "llava_st": Family(
        lambda: peers.LlavaStResampler(24, 32, 4),
        integrations.accelerate_llava_st,
        lambda: (torch.randn(10, 81, 24),),
        replaced=3,
    ),
    "llava_st, one frame": Family(
        lambda: peers.LlavaStResampler(24, 32, 4),
        integrations.accelerate_llava_st,
        lambda: (torch.randn(1, 81, 24),),
        replaced=3,
    ),
    **{f"token_packer, scale {scale}": _token_packer(scale) for scale in (2, 3, 4)},
    **{f"oryx, {kind}": _oryx(kind) for kind in ("video", "video_long", "image")},
    "vision_sampler": Family(
        lambda: peers.SamplerLayer(24, 20, [16, 32, 16], [1, 4, 2], 32, num_heads=4),
        integrations.accelerate_vision_sampler,
        lambda: (
            *(torch.randn(6, size, width) for size, width in ((1, 24), (1, 20), (1, 16), (16, 32), (4, 16))),
            *_masks((6, 1), (6, 4, 4), (6, 2, 2)),
        ),
        replaced=1,
    ),
    "vision_sampler, one tower": Family(
        lambda: peers.TowerAttention(24, 32, 32, 4),
        integrations.accelerate_vision_sampler,
        lambda: (torch.randn(6, 9, 32), torch.randn(6, 1, 24), *_masks((6, 1, 1, 9))),
        replaced=1,
    ),
}


def make(family: Family, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With biases and scales of LayerNorms that matter, as after training."""
    module = family.make()
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float("bias" not in name), 0.2)
    return module.to(dtype)


def inputs_of(family: Family, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return cast(family.inputs(), dtype)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Leaves of their own, of another dtype."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype, copy=True).requires_grad_()
        return value

    return tree_map(change, values)


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def results(module: nn.Module, inputs: Sequence[Any], grads: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs, and where output gradients are given the gradients of all inputs and parameters, by name."""
    outputs = tensors(module(*inputs))
    found = {f"output {number}": output for number, output in enumerate(outputs)}
    if grads is not None:
        torch.autograd.backward(outputs, [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)])
        found.update((f"gradient of input {number}", x.grad) for number, x in enumerate(tensors(inputs)))
        found.update((f"gradient of {name}", parameter.grad) for name, parameter in module.named_parameters())
    return found
