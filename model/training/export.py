"""A trained model as a folder that `from_pretrained` reads: adapters and rows merged, tensors whole."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..checkpoints.reading import TensorSpec
from ..checkpoints.skeleton import expected_shapes, skeleton
from ..checkpoints.writing import new_folder, write_shards
from ..modeling_llava_st import LlavaStForConditionalGeneration
from ..processing_llava_st import LlavaStProcessor
from .sharding import whole_tensor


def export(model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, out: Path, dtype: torch.dtype) -> None:
    """Writes `out`, complete or not at all, one tensor in memory at a time. All processes must call this.

    Raises:
        FileExistsError: there is something at `out`.
        OSError: the disk has no room.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    shapes = expected_shapes(skeleton(config))
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        for left in out.parent.glob(f"{out.name}.partial-*"):  # by a process that was killed in here
            shutil.rmtree(left)
        with new_folder(out, sum(spec.nbytes for spec in specs.values())) as folder:
            write_shards(folder, specs, lambda name: merged(model, name).to(dtype))
            config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            processor.save_pretrained(folder)
    else:
        for name in specs:
            merged(model, name)
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def merged(model: LlavaStForConditionalGeneration, name: str) -> Tensor:
    """The tensor of a name of the model without adapters, whole and on the CPU."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        tensor = whole_tensor(getattr(module.base_layer, leaf))
        if leaf != "weight":
            return tensor
        a, b = (whole_tensor(side["default"].weight).float() for side in (module.lora_A, module.lora_B))
        return torch.addmm(tensor.float(), b, a, alpha=module.scaling["default"])
    tensor = whole_tensor(getattr(module, leaf))
    rows = model.model.trainable_rows
    if rows is not None and module is model.get_input_embeddings():
        return rows.merged(tensor, whole_tensor(rows.weight))
    return tensor
