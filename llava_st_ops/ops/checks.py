"""Input checks of the ops in Python: for every backend, and while tracing.

The native kernels check again, so that raw `torch.ops` calls are safe too. Errors name the argument, what was expected
and what came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

MAX_HEAD_DIM = 1152


def can_read(*tensors: Tensor) -> bool:
    """Whether the contents of tensors can be looked at: on the CPU, and not while tracing."""
    if torch.compiler.is_compiling():
        return False
    return all(tensor.device.type == "cpu" and not is_fake(tensor) for tensor in tensors)


def check_region(op: str, region: Sequence[int]) -> None:
    valid = isinstance(region, (tuple, list, torch.Size)) and len(region) == 3
    if not valid or not all(isinstance(size, (numbers.Integral, torch.SymInt)) and size > 0 for size in region):
        raise ValueError(f"{op}: region must be three positive sizes (time, height, width), got {region!r}")


def regions_of(grid: Sequence[int], region: Sequence[int]) -> list[int]:
    """How many regions, and so queries, a grid has along each axis."""
    return [-(-size // step) for size, step in zip(grid, region, strict=True)]


def check_rank(op: str, name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(
            f"{op}: {name} must have {rank} dimensions {layout}, got {tensor.dim()} with shape {list(tensor.shape)}"
        )


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if list(tensor.shape) != list(expected):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")


def _check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}")


def check_same_kind(op: str, name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    _check_dense(op, name, tensor)
    if tensor.dtype != model.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {model_name}, {model.dtype}, got {tensor.dtype}")
    check_same_device(op, name, tensor, model_name, model)


def check_same_device(op: str, name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.device != model.device:
        raise ValueError(f"{op}: {name} must be on the device of {model_name}, {model.device}, got {tensor.device}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    _check_dense(op, name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be of a floating point dtype, got {tensor.dtype}")


def check_tables(op: str, tables: Sequence[Tensor], channels: int, model_name: str, model: Tensor) -> None:
    """Tables of anchors, `[n, C]` each: of one dtype, on the device of what they belong to."""
    for name, table in zip(("temporal", "height", "width"), tables, strict=True):
        check_rank(op, name, table, 2, "[anchors, C]")
        check_shape(op, name, table, (table.shape[0], channels))
        if table.shape[0] == 0:
            raise ValueError(f"{op}: {name} must have at least one row, got {list(table.shape)}")
        check_floating(op, name, table)
        check_same_device(op, name, table, model_name, model)
        check_same_kind(op, name, table, "temporal", tables[0])


def check_grid_thw(op: str, grid_thw: Tensor, model_name: str, model: Tensor) -> None:
    """All but the contents, which are not read back from a device."""
    if grid_thw.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: grid_thw must be int32 or int64, got {grid_thw.dtype}")
    _check_dense(op, "grid_thw", grid_thw)
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            f"{op}: grid_thw must have shape [videos, 3] (time, height, width), got {list(grid_thw.shape)}"
        )
    if grid_thw.device.type != "cpu" and grid_thw.device != model.device:
        raise ValueError(
            f"{op}: grid_thw must be on the CPU or on the device of {model_name}, {model.device}, got {grid_thw.device}"
        )


def check_scale(op: str, scale: float | None) -> float | None:
    if scale is None:
        return None
    try:
        number = float(scale) if isinstance(scale, numbers.Real) else math.nan
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{op}: scale must be a finite number or None, got {scale!r}")
    return number


def check_grad_output(op: str, grad_output: Tensor, query: Tensor, width: int | None = None) -> None:
    """That it is like `query`, but for its last dimension where a `width` is given."""
    check_same_kind(op, "grad_output", grad_output, "query", query)
    check_shape(op, "grad_output", grad_output, query.shape if width is None else (*query.shape[:-1], width))


def check_attention_inputs(
    op: str, query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], bias: Tensor | None = None
) -> None:
    """Of the dense form: query `[B, T', H', W', heads, D]`, key `[B, T, H, W, heads, D]`, value
    `[B, T, H, W, heads, Dv]`, bias `[B, T, H, W, heads]`."""
    check_region(op, region)
    check_rank(op, "query", query, 6, "[B, T', H', W', heads, D]")
    check_rank(op, "key", key, 6, "[B, T, H, W, heads, D]")
    _check_kinds(op, query, key, value)
    batch, t, h, w, heads, dim = key.shape
    _check_value_and_bias(op, query, key, value, bias)
    check_shape(op, "query", query, (batch, *regions_of((t, h, w), region), heads, dim))


def check_packed_attention_inputs(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    bias: Tensor | None = None,
) -> None:
    """Of the packed form: query `[queries, heads, D]`, key `[tokens, heads, D]`, value `[tokens, heads, Dv]`, grid_thw
    `[videos, 3]`, bias `[tokens, heads]`."""
    check_region(op, region)
    check_rank(op, "query", query, 3, "[queries, heads, D]")
    check_rank(op, "key", key, 3, "[tokens, heads, D]")
    _check_kinds(op, query, key, value)
    _check_value_and_bias(op, query, key, value, bias)
    check_shape(op, "query", query, (query.shape[0], *key.shape[1:]))
    check_grid_thw(op, grid_thw, "query", query)


def check_grids_add_up(
    op: str, grid_thw: Tensor, name: str, tokens: int, region: Sequence[int] = (1, 1, 1), queries: int | None = None
) -> None:
    """That `grid_thw`, read back to the host, holds just the tokens of the argument `name`, and the queries if any."""
    total_tokens = total_queries = 0
    for video, (t, h, w) in enumerate(grid_thw.tolist()):
        if min(t, h, w) < 0:
            raise ValueError(f"{op}: grid_thw must not be negative, got {[t, h, w]} for video {video}")
        total_tokens += t * h * w
        total_queries += math.prod(regions_of((t, h, w), region))
    if total_tokens != tokens:
        raise ValueError(f"{op}: grid_thw must add up to the {tokens} tokens of {name}, got {total_tokens}")
    if queries is not None and total_queries != queries:
        raise ValueError(f"{op}: query must have one row per region of grid_thw, {total_queries}, got {queries}")


def _check_kinds(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    check_floating(op, "query", query)
    check_same_kind(op, "key", key, "query", query)
    check_same_kind(op, "value", value, "query", query)


def _check_value_and_bias(op: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    check_shape(op, "value", value, (*key.shape[:-1], value.shape[-1] if value.dim() == key.dim() else key.shape[-1]))
    for name, head_dim in (("query", key.shape[-1]), ("value", value.shape[-1])):
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: the head dimension (last of {name}) must be at most {MAX_HEAD_DIM}, got {head_dim}"
            )
    if bias is not None:
        check_same_kind(op, "bias", bias, "query", query)
        check_shape(op, "bias", bias, key.shape[:-1])
