"""LAPE's addition: tables of anchors, resized to a video's grid, added to its features.

The native ops are `torch.ops.llava_st.lape_add`, `lape_add_`, `lape_add_packed`, and the `_backward` of the first and
the last. The gradient of the features is that of the result, so the backward ops give those of the tables alone, and
the features are not kept for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .dispatch import computing_tables, register_python_kernels, run, with_defaults
from .registration import Derivative, add_rules, register_autograd, register_in_place

_ADD = "lape_add"
_IN_PLACE = "lape_add_"
_PACKED = "lape_add_packed"


def lape_add(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    *,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """Adds three positions to each patch: `((features + height) + width) + temporal`, in one pass.

    Each table holds one row per anchor of its axis and is resized linearly to the grid: the temporal one with aligned
    ends, so that frame i of T sits at anchor `(n - 1) i / (T - 1)`, as its text coordinate does, and a single frame, or
    an image, takes row 0; height and width by half-pixel centres, as
    `torch.nn.functional.interpolate(align_corners=False)` does. Where a table has as many rows as the grid it is taken
    as it is.

    Args:
        features: `[B, T, H, W, C]`; float32, bfloat16, float16, or on a CPU float64. Strided in any way; where the last
            dimension is not contiguous they are copied first.
        temporal: `[n, C]`. The tables share a dtype, which may be another than that of features.
        height: `[m, C]`.
        width: `[m', C]`.
        text_aligned: height and width sit where text coordinates put the centres of patches, at anchor
            `(m - 1) (i + 1/2) / H`: up to half an anchor from where LLaVA-ST has them.
        round_every_addition: as the published code rounds in low precision: the resized rows and each of the three
            sums, to the dtype of features. Otherwise everything is in float32 (float64 for float64) and rounded once.

    Returns:
        `[B, T, H, W, C]`, contiguous, in the dtype of features. Differentiable once, in features and tables; sums over
        patches are taken in float32 or better, in the same order in every run.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        BackendError: `use_backend` forces a backend that cannot run here.
        torch.OutOfMemoryError: no memory for the result.

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2.
    """
    _check_dense(_ADD, (features, temporal, height, width))
    tables = computing_tables((temporal, height, width), features)
    return run(_ADD, (features, *tables, text_aligned, round_every_addition), reference.lape_add)


def lape_add_(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    *,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """`lape_add` in place, for inference.

    Args:
        features: as in `lape_add`, of shape `[B, T, H, W, C]`; they are changed.
        temporal: `[n, C]`.
        height: `[m, C]`.
        width: `[m', C]`.
        text_aligned: as in `lape_add`.
        round_every_addition: as in `lape_add`.

    Returns:
        features themselves, `[B, T, H, W, C]`.

    Raises:
        RuntimeError: a gradient is wanted; `lape_add` has one.

    Everything else is as in `lape_add`.
    """
    _check_dense(_IN_PLACE, (features, temporal, height, width))
    tables = computing_tables((temporal, height, width), features)
    run(_IN_PLACE, (features, *tables, text_aligned, round_every_addition), _add_in_place)
    return features


def lape_add_packed(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    grid_thw: Tensor,
    *,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """`lape_add` for videos and images of different sizes, packed along one axis; each has the tables resized to it.

    Args:
        features: `[tokens, C]`; the patches of each video in row-major order, video after video.
        temporal: `[n, C]`.
        height: `[m, C]`.
        width: `[m', C]`.
        grid_thw: int32 or int64 `[videos, 3]`, the size of each video in patches (time, height, width). On the CPU it
            is checked to add up. On the GPU it is never read back: patches that belong to no video stay as they are.
        text_aligned: as in `lape_add`.
        round_every_addition: as in `lape_add`.

    Returns:
        Like features. Everything else is as in `lape_add`.
    """
    _check_packed_and_grids(_PACKED, (features, temporal, height, width, grid_thw))
    tables = computing_tables((temporal, height, width), features)
    arguments = (features, *tables, grid_thw, text_aligned, round_every_addition)
    return run(_PACKED, arguments, reference.lape_add_packed)


def _add_in_place(features: Tensor, *others: Any) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (features, *others)):
        raise RuntimeError(f"{_IN_PLACE}: works in place and has no gradient; {_ADD} has one")
    features.copy_(reference.lape_add(features, *others))


# What torch needs to know --------------------------------------------------------------------------------------------


def _check_dense(op: str, arguments: Sequence[Any]) -> None:
    """Of the dense ops: features, or a gradient like them, and the tables."""
    name = "grad_output" if op.endswith("_backward") else "features"
    features, *tables = arguments[:4]
    checks.check_rank(op, name, features, 5, "[B, T, H, W, C]")
    checks.check_floating(op, name, features)
    checks.check_tables(op, tables, features.shape[4], name, features)


def _check_packed(op: str, arguments: Sequence[Any]) -> None:
    name = "grad_output" if op.endswith("_backward") else "features"
    features, *tables, grid_thw = arguments[:5]
    checks.check_rank(op, name, features, 2, "[tokens, C]")
    checks.check_floating(op, name, features)
    checks.check_tables(op, tables, features.shape[1], name, features)
    checks.check_grid_thw(op, grid_thw, name, features)


def _check_grids(op: str, arguments: Sequence[Any]) -> None:
    features, *_, grid_thw = arguments[:5]
    if checks.can_read(grid_thw):
        checks.check_grids_add_up(op, grid_thw, "features", features.shape[0])


def _check_packed_and_grids(op: str, arguments: Sequence[Any]) -> None:
    _check_packed(op, arguments)
    _check_grids(op, arguments)


def _fake(op: str, check: Any) -> Any:
    def fake(*arguments: Any) -> Tensor:
        check(op, arguments)
        return arguments[0].new_empty(arguments[0].shape)

    return fake


def _fake_backward(op: str, check: Any) -> Any:
    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        check(op, arguments)
        return tuple(table.new_empty(table.shape) for table in arguments[1:4])

    return fake


def _fake_in_place(*arguments: Any) -> None:
    _check_dense(_IN_PLACE, arguments)


def _backward_call(op: str, others: int) -> Any:
    """How the gradients of features and tables come from the backward op, which takes `others` more arguments."""

    def call(
        backward_op: torch._ops.OpOverload, grad: Tensor, outputs: Any, arguments: Sequence[Any], needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        if not any(needed[1:]):
            return grad, None, None, None
        arguments = with_defaults(op, tuple(arguments))
        return grad, *backward_op(grad, *arguments[1 : 4 + others])

    return call


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    for name, others, check in ((_ADD, 1, _check_dense), (_PACKED, 2, _check_packed)):
        forward_op, backward_op = getattr(ops, name).default, getattr(ops, f"{name}_backward").default
        derivative = Derivative(backward_op, tensors=4, call=_backward_call(name, others), unsaved=(0,))
        register_autograd(registry, forward_op, derivative)
        torch.library.register_fake(f"{namespace}::{name}", _fake(name, check), lib=registry)
        fake_backward = _fake_backward(f"{name}_backward", check)
        torch.library.register_fake(f"{namespace}::{name}_backward", fake_backward, lib=registry)
    register_in_place(registry, getattr(ops, _IN_PLACE).default, instead=_ADD)
    torch.library.register_fake(f"{namespace}::{_IN_PLACE}", _fake_in_place, lib=registry)


add_rules(_register)
register_python_kernels(_ADD, "lape_add", reference.lape_add, _check_dense)
register_python_kernels(_IN_PLACE, "lape_add_", _add_in_place, _check_dense)
register_python_kernels(f"{_ADD}_backward", "lape_add_backward", reference.lape_add_backward, _check_dense)
register_python_kernels(_PACKED, "lape_add_packed", reference.lape_add_packed, _check_packed_and_grids)
register_python_kernels(
    f"{_PACKED}_backward", "lape_add_packed_backward", reference.lape_add_packed_backward, _check_packed_and_grids
)
