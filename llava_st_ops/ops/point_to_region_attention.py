"""Point-to-region attention: each query attends to the keys of its own block of a video's grid, and to nothing else.

The native ops are `torch.ops.llava_st.point_to_region_attention`, `..._packed`, and the `_backward` of each. The Triton
kernels stand behind ops of the same names under `torch.ops.llava_st_triton`. This module gives them fakes, autograd,
autocast and vmap rules, and holds the public functions, which choose a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import checks
from .dispatch import register_python_kernels, run, with_defaults
from .registration import Derivative, add_rules, autocast, register_autocast, register_autograd

_DENSE = "point_to_region_attention"
_PACKED = "point_to_region_attention_packed"


def point_to_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each query over the tokens of its own region.

    A grid of `T x H x W` tokens is cut into non-overlapping regions of `region = (rt, rh, rw)` tokens; regions at the
    far edges may be partial. There is one query per region, `T' = ceil(T / rt)` and so on. LLaVA-ST's spatial stream
    is `(1, 3, 3)`, its temporal stream `(5, 1, 1)`.

    Args:
        query: `[B, T', H', W', heads, D]`.
        key: `[B, T, H, W, heads, D]`.
        value: `[B, T, H, W, heads, Dv]`; often `Dv` is `D`.
        region: tokens per region along time, height and width.
        scale: factor on the scores; `D ** -0.5` by default.
        bias: `[B, T, H, W, heads]`, or `[B, T, H, W, 1]` for all heads alike: added to the scaled scores. Where it is
            `-inf` a key is masked: it takes no part, whatever key and value hold there. A boolean one is a mask as in
            torch's own attention: True takes part. A region without any other key gives zeros, and no gradients.

    But for a boolean mask, all tensors share device and dtype (float32, bfloat16 or float16; float64 too on a CPU);
    under autocast they are cast to its dtype. They may be strided in any way. Where the last dimension is not
    contiguous the CPU and CUDA kernels copy the tensor first; where rows are not aligned to 16 bytes the CUDA kernel
    reads them element by element. `D` and `Dv` are at most 1,152. Sums are taken in float32, in float64 for float64.
    The result is the same in every run.

    Returns:
        `[B, T', H', W', heads, Dv]`, contiguous, in the dtype of `query`. Differentiable once; for double backward and
        the transforms of torch.func other than vmap the reference runs instead, or is to be asked for
        (`use_backend("reference")`).

    Raises:
        ValueError: shapes, devices, `region` or `scale` that do not fit.
        TypeError: dtypes that do not fit.
        BackendError: `use_backend` forces a backend that cannot run here.
        torch.OutOfMemoryError: no memory for the result.

    Source: LLaVA-ST (arXiv:2501.08282), Spatial-Temporal Packer; the scheme is TokenPacker's (arXiv:2407.02392). Biases
    and masks are those of the window aggregators of other models, such as Cambrian-1 (arXiv:2406.16860).
    """
    query, key, value, bias = _prepare(query, key, value, bias)
    checks.check_attention_inputs(_DENSE, query, key, value, region, bias)
    scale = checks.check_scale(_DENSE, scale)
    return run(_DENSE, (query, key, value, list(region), scale, bias), reference.point_to_region_attention)


def point_to_region_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid_thw: Tensor,
    region: Sequence[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`point_to_region_attention` for videos and images of different sizes, packed along one axis.

    Args:
        query: `[queries, heads, D]`; the regions of each video in row-major order, video after video.
        key: `[tokens, heads, D]`; the tokens of each video in row-major order, video after video.
        value: `[tokens, heads, Dv]`.
        grid_thw: int32 or int64 `[videos, 3]`, the size of each video in tokens (time, height, width). On the CPU it
            is checked to add up. On the GPU it is never read back: queries that belong to no video get zeros, tokens
            that belong to none get no gradient, and tokens that do not exist are passed over. CUDA graphs want it
            there.
        region: tokens per region along time, height and width.
        scale: factor on the scores; `D ** -0.5` by default.
        bias: `[tokens, heads]` or `[tokens, 1]`.

    Returns:
        `[queries, heads, Dv]`. Everything else is as in `point_to_region_attention`.
    """
    query, key, value, bias = _prepare(query, key, value, bias)
    checks.check_packed_attention_inputs(_PACKED, query, key, value, grid_thw, region, bias)
    scale = checks.check_scale(_PACKED, scale)
    if checks.can_read(grid_thw):
        checks.check_grids_add_up(_PACKED, grid_thw, "key", key.shape[0], region, query.shape[0])
    arguments = (query, key, value, grid_thw, list(region), scale, bias)
    return run(_PACKED, arguments, reference.point_to_region_attention_packed)


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype of autocast; the bias one that is added, with a number for each head."""
    query, key, value = autocast(query, key, value)
    if bias is None or bias.layout != torch.strided:  # which the checks refuse
        return query, key, value, bias
    if bias.dtype == torch.bool and query.is_floating_point():  # else they say what is wrong
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -math.inf)
    else:
        (bias,) = autocast(bias)
    if bias.dim() == key.dim() - 1 and bias.shape[-1] == 1:
        bias = bias.expand(*bias.shape[:-1], key.shape[-2])
    return query, key, value, bias


# Checks and fakes ---------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The arguments of a call of any of the ops."""

    grad_output: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    grid_thw: Tensor | None
    region: Any
    bias: Tensor | None


def _split(op: str, arguments: tuple[Any, ...]) -> _Call:
    *tensors, region, _, bias = with_defaults(op, arguments)
    grad_output = tensors.pop(0) if op.endswith("_backward") else None
    query, key, value, *grid_thw = tensors
    return _Call(grad_output, query, key, value, grid_thw[0] if grid_thw else None, region, bias)


def _check(op: str, arguments: tuple[Any, ...]) -> _Call:
    """Checks the arguments of any of the ops."""
    call = _split(op, arguments)
    if call.grid_thw is None:
        checks.check_attention_inputs(op, call.query, call.key, call.value, call.region, call.bias)
    else:
        checks.check_packed_attention_inputs(
            op, call.query, call.key, call.value, call.grid_thw, call.region, call.bias
        )
    if call.grad_output is not None:
        checks.check_grad_output(op, call.grad_output, call.query, call.value.shape[-1])
    return call


def _check_contents(op: str, arguments: tuple[Any, ...]) -> None:
    """The same, and what only the contents of `grid_thw` tell."""
    call = _check(op, arguments)
    if call.grid_thw is not None and checks.can_read(call.grid_thw):
        checks.check_grids_add_up(op, call.grid_thw, "key", call.key.shape[0], call.region, call.query.shape[0])


def _fake_of(op: str) -> Callable[..., Any]:
    def fake(*arguments: Any) -> Any:
        call = _check(op, arguments)
        if call.grad_output is None:
            return call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
        bias_shape = (0,) if call.bias is None else call.bias.shape
        return tuple(call.query.new_empty(x) for x in (call.query.shape, call.key.shape, call.value.shape, bias_shape))

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
        *gradients, of_bias = outputs
        unfolded = [gradient.unflatten(fold, sizes) for gradient in gradients]
        if of_bias.dim() == 1:  # of no bias
            return (*unfolded, of_bias), (*(fold for _ in unfolded), None)
        return (*unfolded, of_bias.unflatten(fold, sizes)), (fold,) * len(outputs)

    return rule


# Registration -------------------------------------------------------------------------------------------------------


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    for name, fold in ((_DENSE, 0), (_PACKED, 1)):
        forward_op, backward_op = getattr(ops, name).default, getattr(ops, f"{name}_backward").default
        bias = len(forward_op._schema.arguments) - 1
        register_autograd(registry, forward_op, Derivative(backward_op, tensors=3, last=bias))
        register_autocast(registry, forward_op, tensors=3, last=bias)
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
