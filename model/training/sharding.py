"""Parameters dealt out over processes (FSDP2), and whole tensors from them."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..modeling_llava_st import LlavaStForConditionalGeneration


def refuse_other_sharding() -> None:
    """Raises ValueError where accelerate was told to shard, by DeepSpeed or by itself."""
    for name in ("DeepSpeed", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise ValueError(
                f"accelerate's {name} is not supported: `--set sharding=fsdp2` shards as ZeRO 3 does (FSDP2), started "
                "with torchrun"
            )


def shard(model: LlavaStForConditionalGeneration, bf16: bool) -> None:
    """Deals out a model's parameters in place.

    Each layer of the language model is a group. All else is in the root's: every process gathers that in every step,
    whether its batch has videos, images or neither, and none waits for another. The vision tower, which is frozen and
    called layer by layer, stays whole in each process.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    names = set(model.model.language_model._no_split_modules or ())
    layers = [module for module in model.model.language_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"sharding: {type(model.model.language_model).__name__} does not say which layers it has")
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    root = dataclasses.replace(policy, cast_forward_inputs=False)  # positions are not to be rounded
    fully_shard(model, ignored_params=set(model.model.vision_tower.parameters()), mp_policy=root)
    register_fsdp_forward_method(model, "encode")  # which evaluations call, too


def whole_tensor(tensor: Tensor, main: bool = True) -> Tensor | None:
    """A tensor on the CPU, put together from all processes, which must all call this; None where not `main`."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if main else None


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor that takes the place of `other`."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.copy_(like(tensor.to(parameter.dtype), parameter))
