"""Point-to-region attention: each query attends to the keys of its own block of a video's grid, and to nothing else.

The native ops are `torch.ops.llava_st.point_to_region_attention`, `..._packed`, and the `_backward` of each. The Triton
kernels stand behind ops of the same names under `torch.ops.llava_st_triton`. This module gives them fakes, autograd,
autocast and vmap rules, and holds the public functions, which choose a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .dispatch import register_python_kernels, run, with_defaults
from .registration import Derivative, add_rules, autocast, register_autocast, register_autograd

_DENSE = "point_to_region_attention"
_PACKED = "point_to_region_attention_packed"


def point_to_region_attention(
    query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], scale: float | None = None
) -> Tensor:
    """Attention of each query over the tokens of its own region.

    A grid of `T x H x W` tokens is cut into non-overlapping regions of `region = (rt, rh, rw)` tokens; regions at the
    far edges may be partial. There is one query per region, `T' = ceil(T / rt)` and so on. LLaVA-ST's spatial stream
    is `(1, 3, 3)`, its temporal stream `(5, 1, 1)`.

    Args:
        query: `[B, T', H', W', heads, D]`.
        key: `[B, T, H, W, heads, D]`.
        value: `[B, T, H, W, heads, D]`.
        region: tokens per region along time, height and width.
        scale: factor on the scores; `D ** -0.5` by default.

    All three tensors share device and dtype (float32, bfloat16 or float16; float64 too on a CPU); under autocast they
    are cast to its dtype. They may be strided
    in any way. Where the last dimension is not contiguous the CPU and CUDA kernels copy the tensor first; where rows
    are not aligned to 16 bytes the CUDA kernel reads them element by element. `D` is at most 256. Sums are taken in
    float32, in float64 for float64. The result is the same in every run.

    Returns:
        `[B, T', H', W', heads, D]`, contiguous, in the dtype of `query`. Differentiable once; for double backward and
        the transforms of torch.func other than vmap the reference runs instead, or is to be asked for
        (`use_backend("reference")`).

    Raises:
        ValueError: shapes, devices, `region` or `scale` that do not fit.
        TypeError: dtypes that do not fit.
        BackendError: `use_backend` forces a backend that cannot run here.
        torch.OutOfMemoryError: no memory for the result.

    Source: LLaVA-ST (arXiv:2501.08282), Spatial-Temporal Packer; the scheme is TokenPacker's (arXiv:2407.02392).
    """
    query, key, value = autocast(query, key, value)
    checks.check_attention_inputs(_DENSE, query, key, value, region)
    scale = checks.check_scale(_DENSE, scale)
    return run(_DENSE, (query, key, value, list(region), scale), reference.point_to_region_attention)


def point_to_region_attention_packed(
    query: Tensor, key: Tensor, value: Tensor, grid_thw: Tensor, region: Sequence[int], scale: float | None = None
) -> Tensor:
    """`point_to_region_attention` for videos and images of different sizes, packed along one axis.

    Args:
        query: `[queries, heads, D]`; the regions of each video in row-major order, video after video.
        key: `[tokens, heads, D]`; the tokens of each video in row-major order, video after video.
        value: like `key`.
        grid_thw: int32 or int64 `[videos, 3]`, the size of each video in tokens (time, height, width). On the CPU it
            is checked to add up. On the GPU it is never read back: queries that belong to no video get zeros, tokens
            that belong to none get no gradient, and tokens that do not exist are passed over. CUDA graphs want it
            there.
        region: tokens per region along time, height and width.
        scale: factor on the scores; `D ** -0.5` by default.

    Returns:
        Like `query`. Everything else is as in `point_to_region_attention`.
    """
    query, key, value = autocast(query, key, value)
    checks.check_packed_attention_inputs(_PACKED, query, key, value, grid_thw, region)
    scale = checks.check_scale(_PACKED, scale)
    if checks.can_read(grid_thw):
        checks.check_grids_add_up(_PACKED, grid_thw, "key", key.shape[0], region, query.shape[0])
    arguments = (query, key, value, grid_thw, list(region), scale)
    return run(_PACKED, arguments, reference.point_to_region_attention_packed)


# Checks and fakes ---------------------------------------------------------------------------------------------------


def _split(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Any]:
    """grad_output, query, key, value, grid_thw and region of a call of any of the ops."""
    *tensors, region, _ = with_defaults(op, arguments)
    grad_output = tensors.pop(0) if op.endswith("_backward") else None
    query, key, value, *grid_thw = tensors
    return grad_output, query, key, value, grid_thw[0] if grid_thw else None, region


def _check(op: str, arguments: tuple[Any, ...]) -> None:
    """Checks the arguments of any of the ops."""
    grad_output, query, key, value, grid_thw, region = _split(op, arguments)
    if grid_thw is None:
        checks.check_attention_inputs(op, query, key, value, region)
    else:
        checks.check_packed_attention_inputs(op, query, key, value, grid_thw, region)
    if grad_output is not None:
        checks.check_grad_output(op, grad_output, query)


def _check_contents(op: str, arguments: tuple[Any, ...]) -> None:
    """The same, and what only the contents of `grid_thw` tell."""
    _check(op, arguments)
    _, query, key, _, grid_thw, region = _split(op, arguments)
    if grid_thw is not None and checks.can_read(grid_thw):
        checks.check_grids_add_up(op, grid_thw, "key", key.shape[0], region, query.shape[0])


def _fake_of(op: str) -> Callable[..., Any]:
    def fake(*arguments: Any) -> Any:
        _check(op, arguments)
        grad_output, query, key, value, *_ = _split(op, arguments)
        if grad_output is None:
            return query.new_empty(query.shape)
        return tuple(x.new_empty(x.shape) for x in (query, key, value))

    return fake


# vmap ---------------------------------------------------------------------------------------------------------------


def _vmap_rule(op: torch._ops.OpOverload, fold: int) -> Callable[..., Any]:
    """A rule that folds the mapped dimension into dimension `fold` of the op's tensors: a dense batch takes more
    samples, a packed one more heads."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        folded = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, Tensor) and not argument.dtype.is_floating_point:
                if dim is not None:
                    raise NotImplementedError(f"{op}: vmap over grid_thw is not supported")
            elif isinstance(argument, Tensor):
                if dim is None:
                    argument = argument.unsqueeze(fold).expand(
                        *argument.shape[:fold], info.batch_size, *argument.shape[fold:]
                    )
                else:
                    argument = argument.movedim(dim, fold)
                sizes = argument.shape[fold : fold + 2]  # the same for all tensors of the op
                argument = argument.flatten(fold, fold + 1)
            folded.append(argument)
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(fold, sizes), fold
        return tuple(output.unflatten(fold, sizes) for output in outputs), (fold,) * len(outputs)

    return rule


# Registration -------------------------------------------------------------------------------------------------------


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    for name, fold in ((_DENSE, 0), (_PACKED, 1)):
        forward_op, backward_op = getattr(ops, name).default, getattr(ops, f"{name}_backward").default
        register_autograd(registry, forward_op, Derivative(backward_op, tensors=3))
        register_autocast(registry, forward_op, tensors=3)
        for op in (forward_op, backward_op):
            torch.library.register_vmap(op, _vmap_rule(op, fold), lib=registry)
    for name in _PYTHON_KERNELS:
        torch.library.register_fake(f"{namespace}::{name}", _fake_of(name), lib=registry)


# For each op the function of llava_st_ops.triton, and the reference.
_PYTHON_KERNELS = {
    _DENSE: ("forward", reference.point_to_region_attention),
    f"{_DENSE}_backward": ("backward", reference.point_to_region_attention_backward),
    _PACKED: ("packed_forward", reference.point_to_region_attention_packed),
    f"{_PACKED}_backward": ("packed_backward", reference.point_to_region_attention_packed_backward),
}

add_rules(_register)
for _op, (_triton_function, _plain) in _PYTHON_KERNELS.items():
    register_python_kernels(_op, _triton_function, _plain, _check_contents)
