"""What the launchers of all Triton kernels share. Importing it does not import Triton."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .regions import Layout


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Every kernel of the package starts here, called as `launching.launch`: tests put something else in its place."""
    kernel[grid](*arguments, **options)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def normalized_strides(tensor: Tensor, dims: int) -> tuple[int, ...]:
    """The strides of a tensor, with zeros in front for the dimensions up to `dims` that it lacks.

    The stride of a dimension of size 1 means nothing: zero, or 1 for the last one, lets more calls share a compiled
    kernel.
    """
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if tensor.shape[-1] == 1:
        strides[-1] = 1
    return (0,) * (dims - len(strides)) + tuple(strides)


def dense_layout(query: Tensor, key: Tensor, region: Sequence[int]) -> Layout:
    """The layout of queries, one per region, and of the tokens of grids that are all the same."""
    from .regions import Layout

    batch, *grid = key.shape[:4]
    return Layout(
        queries=math.prod(query.shape[:4]),
        tokens=batch * math.prod(grid),
        # A region never reaches beyond the grid: what is larger is the whole of it, and needs no larger tile.
        region=tuple(max(1, min(step, size)) for step, size in zip(region, grid, strict=True)),
        grid=tuple(grid),
        regions=tuple(query.shape[1:4]),
    )


def packed_layout(tokens: Tensor, queries: int, grid_thw: Tensor, region: Sequence[int]) -> Layout:
    """The layout of a packed call on rows of `tokens`, with the offsets of its videos computed on the device."""
    from .regions import Layout, video_offsets_kernel

    if tokens.is_cuda and not grid_thw.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("grid_thw must be on the device of the tokens while a CUDA graph is captured, got cpu")
        # Pageable memory is free to change as soon as the call returns; pinned memory would have to stay as it is.
        grid_thw = grid_thw.to(tokens.device, non_blocking=not grid_thw.is_pinned())
    videos = grid_thw.shape[0]
    layout = Layout(
        queries=queries,
        tokens=len(tokens),
        # The kernels clamp the sizes of videos to no more than this: a region that large is the whole video.
        region=tuple(min(step, max(len(tokens), queries) + 1) for step in region),
        grid_thw=grid_thw,
        grid_strides=grid_thw.stride(),
        offsets=torch.empty((videos + 1, 2), dtype=torch.int64, device=tokens.device),
        videos=videos,
        search_steps=videos.bit_length(),
    )
    launch(video_offsets_kernel, (1,), layout, BLOCK=min(1024, next_power_of_2(max(videos, 32))))
    return layout
