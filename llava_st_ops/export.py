"""Exports packers and frozen visual tokenizers with the ops inside, for other processes and C++ (docs/export.md)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .nn.visual_tokenizer import FrozenVisualTokenizer


def export_program(module: nn.Module, features: Tensor, max_frames: int | None = None) -> ExportedProgram:
    """A packer or a frozen visual tokenizer as a graph, for inference.

    The graph holds calls of `torch.ops.llava_st.*`, of the backend that the device and dtype of features take (see
    `use_backend`): what loads it must load the native library first, by `import llava_st_ops` or, without Python, by
    `dlopen`. Save it with `torch.export.save`, or compile it with `torch._inductor.aoti_compile_and_package`.

    Args:
        module: `SpatialTemporalPacker`, `PointToRegionPacker`, or what `VisualTokenizer.freeze` gives.
        features: an example, `[B, T, H, W, C]`. The program takes this size, dtype and device alone.
        max_frames: the program takes any number of frames T up to this one, from one more than the longest region of
            the module has on (`range_constraints` tells). A tokenizer then takes all frames at once, whatever its
            `chunk_tokens`.

    Returns:
        The program, which takes features and gives what the module gives.

    Raises:
        ValueError: features of the wrong rank, or of more frames than max_frames or too few to export from.
    """
    if features.dim() != 5:
        raise ValueError(f"features must have 5 dimensions [B, T, H, W, C], got shape {list(features.shape)}")
    if max_frames is None:
        sizes = None
    elif not 2 <= features.shape[1] <= max_frames:
        raise ValueError(f"features must have 2 to max_frames = {max_frames} frames, got {features.shape[1]}")
    else:
        sizes = ({1: Dim.DYNAMIC(max=max_frames)},)
        if isinstance(module, FrozenVisualTokenizer):
            module = copy.copy(module)
            module.chunk_tokens = 0  # a loop over chunks would fix their number
    with torch.no_grad():
        return torch.export.export(module, (features,), dynamic_shapes=sizes)
