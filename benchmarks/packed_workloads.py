"""Videos and images of different lengths, packed along one axis: one call of ours, or one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import llava_st_ops
from llava_st_ops import reference

from . import peers
from .cases import BYTES_COUNTED, HEAD_DIM, HEADS, MODES
from .clip import GRID, Clip, attention_inputs, patch_features
from .parity import TENSORS
from .position_peers import eager_add
from .position_workloads import ADDITION, ANCHORS, WIDTH, addition_costs, addition_passes
from .workloads import Workload, bytes_of, describe, on_each_backend, seeded, workload_of

LENGTHS = (1, 8, 1, 4, 16, 2, 1, 7)  # frames of each: pictures among videos
REGION = (1, 3, 3)
_BASELINE = "eager, as published, one by one"
_REASON = "pictures among videos, 40 frames in all, as packed batches of training have them"


def _grids(device: torch.device) -> Tensor:
    return torch.tensor([(frames, GRID, GRID) for frames in LENGTHS], device=device)


def _one_by_one(function: Callable[..., Tensor], frames: Sequence[Tensor], *shared: object) -> Tensor:
    """`function` of each video's part of `frames`, `[all frames, H, W, ...]` each, as `[1, T, H, W, ...]`."""
    videos = zip(*(x.split(LENGTHS) for x in frames), strict=True)
    return torch.cat([function(*(x.unsqueeze(0) for x in video), *shared).flatten(0, 3) for video in videos])


def attention_workload(mode: str, clip: Clip, device: torch.device) -> Workload:
    """Spatial regions of `point_to_region_attention_packed`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backward = mode != "forward"
    dense = attention_inputs(clip, sum(LENGTHS), REGION, HEADS, HEAD_DIM, dtype, device)
    shapes = [x.shape[1:4] for x in dense]
    tensors = [x.flatten(0, 3) for x in dense]
    grid_thw = _grids(device)
    grad = seeded(tuple(tensors[0].shape), 4, dtype, device)

    def ours(*tensors: Tensor) -> Tensor:
        return llava_st_ops.point_to_region_attention_packed(*tensors, grid_thw, REGION)

    def plain(*tensors: Tensor) -> Tensor:
        return reference.point_to_region_attention_packed(*tensors, grid_thw, REGION)

    def separate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            frames = [x.unflatten(0, shape) for x, shape in zip(tensors, shapes, strict=True)]
            return _one_by_one(function, frames, REGION)

        return call

    query, key, value = sizes = [bytes_of(x) for x in tensors]
    torch.compiler.reset()  # what was compiled for earlier cases
    compiled = torch.compile(peers.multiply_and_sum, dynamic=True, fullgraph=True)
    return workload_of(
        describe(
            f"point_to_region_attention_packed {len(LENGTHS)} videos",
            mode,
            dtype,
            _REASON,
            _BASELINE,
            bytes_read=query + key + value + (2 * query + key + value if backward else 0),
            bytes_written=query + (query + key + value if backward else 0),
            bytes_counted=BYTES_COUNTED[mode],
        ),
        TENSORS,
        tensors,
        (grad,),
        plain,
        [
            *on_each_backend(ours, device, dtype),
            (_BASELINE, "peer", separate(peers.eager)),
            ("multiply-and-sum, compiled, one by one", "peer", separate(compiled)),
        ],
        [(tensors, sizes[:1]), ([*tensors, grad], sizes)],
    )


def addition_workload(mode: str, clip: Clip, device: torch.device) -> Workload:
    """`lape_add_packed`: each video has the tables resized to it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    features = patch_features(clip, sum(LENGTHS), WIDTH, device).to(dtype).flatten(0, 3)
    tables = [seeded((ANCHORS, WIDTH), seed, dtype, device) for seed in (1, 2, 3)]
    grad = seeded(tuple(features.shape), 4, dtype, device)
    grid_thw = _grids(device)

    def ours(*tensors: Tensor) -> Tensor:
        return llava_st_ops.lape_add_packed(*tensors, grid_thw)

    def plain(*tensors: Tensor) -> Tensor:
        return reference.lape_add_packed(*tensors, grid_thw)

    def eager(features: Tensor, *tables: Tensor) -> Tensor:
        return _one_by_one(eager_add, [features.unflatten(0, (-1, GRID, GRID))], *tables)

    torch.compiler.reset()
    costs = addition_costs(mode, features, tables)
    return workload_of(
        describe(f"lape_add_packed {len(LENGTHS)} videos", mode, dtype, _REASON, _BASELINE, **costs),
        ADDITION,
        [features, *tables],
        (grad,),
        plain,
        [
            *on_each_backend(ours, device, dtype),
            (_BASELINE, "peer", eager),
            ("eager, compiled, all in one", "peer", torch.compile(eager, dynamic=False, fullgraph=True)),
        ],
        addition_passes([features, *tables], grad),
    )


# As in position_workloads.
BUILDERS: dict[str, tuple[Callable[[Clip, torch.device], Workload], bool]] = {
    f"{name}, {mode}": (functools.partial(build, mode), True)
    for name, build in (
        ("point_to_region_attention_packed", attention_workload),
        ("lape_add_packed", addition_workload),
    )
    for mode in MODES
}
