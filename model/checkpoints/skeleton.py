"""A model without weights: the names and shapes that a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..configuration_llava_st import LlavaStConfig
from ..modeling_llava_st import LlavaStForConditionalGeneration
from .reading import CheckpointError, TensorSpec, read_json


def load_config(folder: Path) -> LlavaStConfig:
    """The config of a checkpoint in this package's layout."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != LlavaStConfig.model_type:
        raise CheckpointError(f"{folder}: model_type: expected {LlavaStConfig.model_type!r}, got {kind!r}")
    return LlavaStConfig.from_pretrained(folder)


def skeleton(config: LlavaStConfig) -> LlavaStForConditionalGeneration:
    """The model on the meta device, where tensors have shapes and nothing else."""
    with torch.device("meta"):
        return LlavaStForConditionalGeneration(config)


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of a model holds; of tensors that are tied, one."""
    tied = getattr(model, "_tied_weights_keys", None) or {} if model.config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_shapes(got: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """That tensors are those that are expected.

    Raises:
        CheckpointError: some are missing, unexpected or of another shape; the message lists all of them.
    """
    problems = [f"missing: {name}" for name in expected if name not in got]
    problems += [f"unexpected: {name}" for name in got if name not in expected]
    problems += [
        f"{name}: expected shape {list(shape)}, got {list(got[name].shape)}"
        for name, shape in expected.items()
        if name in got and got[name].shape != shape
    ]
    if problems:
        raise CheckpointError(f"the checkpoint has {len(problems)} wrong tensors:\n  " + "\n  ".join(problems))
