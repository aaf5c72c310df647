"""The input embeddings of a language model: words, coordinates and visual tokens, each in its place.

The native ops are `torch.ops.llava_st.lape_scatter` and `lape_scatter_backward`. The backward op takes a plan: which
rows of the gradient, and how much of each, go to which row of which source, in the order of the sources' rows. It is
made with torch's own ops (`scatter_plan`), so that each destination has one writer and sums in the order of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.lape import check_scatter, check_scattered_tokens
from . import checks
from .dispatch import computing_tables, register_python_kernels, run
from .registration import Derivative, add_rules, register_autograd

_OP = "lape_scatter"
_BACKWARD = "lape_scatter_backward"


def lape_scatter(
    embed: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    input_ids: Tensor,
    axis: Tensor,
    positions: Tensor,
    visual_index: Tensor,
    visual: Tensor,
) -> Tensor:
    """The input embeddings of a batch, in one pass: rows of words, coordinates between anchors, visual tokens.

    Of each token the first that applies counts:

    1. `visual_index >= 0`: that row of `visual`. Not all need be used, and one may be used twice.
    2. `axis >= 0`: the row at `positions`, a fraction of the axis, clipped to [0, 1], between the two anchors of that
       table around it: `(1 - r) row f + r row g` with `e = (n - 1) p`, `f = floor(e)`, `g = ceil(e)`, `r = e - f`.
    3. The row of `input_ids`: V of `embed`, then n of temporal, m of height and m' of width.

    What does not count is not read: the id of a placeholder may be anything.

    Args:
        embed: `[V, C]`; float32, bfloat16, float16, or on a CPU float64.
        temporal: `[n, C]`. The tables share a dtype, which may be another than that of embed.
        height: `[m, C]`.
        width: `[m', C]`.
        input_ids: int32 or int64 `[N]`, or of any other shape, such as `[B, L]`.
        axis: int8, of the same shape: -1 none, 0 temporal, 1 height, 2 width.
        positions: float64, of the same shape. No gradient flows into them.
        visual_index: int32 or int64, of the same shape: a row of visual, or -1.
        visual: `[M, C]`, in the dtype of embed: the visual tokens of all samples, one after the other.

    Returns:
        `[N, C]` (`[B, L, C]`), contiguous, in the dtype of embed. Interpolation is in float32 (float64 for float64) and
        rounded once. Differentiable once, in embed, tables and visual; the same bits in every run.

    Raises:
        ValueError: shapes or devices that do not fit. Where the token tensors are on the CPU: an id, an axis or a
            visual index out of range, or NaN as the position of a token with an axis; the message names the token.
        TypeError: dtypes that do not fit.
        BackendError, torch.OutOfMemoryError: as in `lape_add`.

    Nothing waits for a GPU. What is wrong with a token there makes a row of NaN: check on the CPU, before the transfer
    (`nn.CoordinateTokens.check`).

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2.
    """
    tables = (temporal, height, width)
    tokens = (input_ids, axis, positions, visual_index)
    _check_sources(_OP, embed, tables, visual)
    check_scatter(_OP, embed, tables, *tokens, visual)
    _check_devices(_OP, embed, tokens)
    if checks.can_read(*tokens):
        check_scattered_tokens(_OP, len(embed) + sum(map(len, tables)), len(visual), *tokens)
    flat = [tensor.reshape(-1) for tensor in tokens]
    output = run(_OP, (embed, *computing_tables(tables, embed), *flat, visual), reference.lape_scatter)
    return output.view(*input_ids.shape, embed.shape[1])


def scatter_plan(
    rows: Sequence[int], input_ids: Tensor, axis: Tensor, positions: Tensor, visual_index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the gradients of N tokens go: destination, token and share, `[2 N]` each, ascending by destination.

    `rows` are those of embed, temporal, height, width and visual; destinations number them through. What goes nowhere
    has a destination past the last. Waits for no device.
    """
    words, *counts, visuals = rows
    begins = [words, words + counts[0], words + counts[0] + counts[1]]
    ids = words + sum(counts)
    nowhere = ids + visuals

    def of_axis(values: Sequence[int]) -> Tensor:
        return torch.where(axis == 0, values[0], torch.where(axis == 1, values[1], values[2]))

    is_visual = visual_index >= 0
    is_coordinate = ~is_visual & (axis >= 0) & (axis < len(counts)) & ~positions.isnan() & (visual_index == -1)
    is_text = (visual_index == -1) & (axis == -1) & (input_ids >= 0) & (input_ids < ids)
    anchor = torch.where(is_coordinate, positions, 0.0).clamp(0, 1) * (of_axis(counts) - 1)
    low = anchor.floor()
    ratio = anchor - low
    begin = of_axis(begins)
    first = torch.where(is_text, input_ids.long(), nowhere)
    first = torch.where(is_coordinate, begin + low.long(), first)
    first = torch.where(is_visual & (visual_index < visuals), ids + visual_index.long(), first)
    second = torch.where(is_coordinate & (ratio > 0), begin + anchor.ceil().long(), nowhere)
    share = torch.where(is_coordinate, 1 - ratio, 1.0)

    token = torch.arange(len(input_ids), device=input_ids.device).repeat(2)
    destination, order = torch.cat([first, second]).sort(stable=True)
    return destination, token[order], torch.cat([share, ratio])[order]


# What torch needs to know --------------------------------------------------------------------------------------------


def _check_sources(op: str, embed: Tensor, tables: Sequence[Tensor], visual: Tensor) -> None:
    checks.check_rank(op, "embed", embed, 2, "[V, C]")
    checks.check_floating(op, "embed", embed)
    checks.check_tables(op, tables, embed.shape[1], "embed", embed)
    checks.check_same_kind(op, "visual", visual, "embed", embed)


def _check_devices(op: str, embed: Tensor, tokens: Sequence[Tensor]) -> None:
    for name, tensor in zip(("input_ids", "axis", "positions", "visual_index"), tokens, strict=True):
        checks.check_same_device(op, name, tensor, "embed", embed)


def _check(op: str, arguments: Sequence[Any]) -> None:
    embed, *tables, input_ids, axis, positions, visual_index, visual = arguments
    _check_sources(op, embed, tables, visual)
    checks.check_rank(op, "input_ids", input_ids, 1, "[N]")
    check_scatter(op, embed, tables, input_ids, axis, positions, visual_index, visual)
    _check_devices(op, embed, (input_ids, axis, positions, visual_index))


def _check_backward(op: str, arguments: Sequence[Any]) -> None:
    grad_output, destination, token, share, embed, *tables, visual = arguments
    _check_sources(op, embed, tables, visual)
    checks.check_same_kind(op, "grad_output", grad_output, "embed", embed)
    checks.check_shape(op, "grad_output", grad_output, (grad_output.shape[0], embed.shape[1]))
    checks.check_shape(op, "token", token, destination.shape)
    checks.check_shape(op, "share", share, destination.shape)


def _fake(*arguments: Any) -> Tensor:
    _check(_OP, arguments)
    embed, input_ids = arguments[0], arguments[4]
    return embed.new_empty(input_ids.shape[0], embed.shape[1])


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_backward(_BACKWARD, arguments)
    return tuple(source.new_empty(source.shape) for source in arguments[4:])


def _call_backward(
    backward_op: torch._ops.OpOverload, grad: Tensor, outputs: Any, arguments: Sequence[Any], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    embed, temporal, height, width, input_ids, axis, positions, visual_index, visual = arguments
    sources = (embed, temporal, height, width, visual)
    plan = scatter_plan([len(source) for source in sources], input_ids, axis, positions, visual_index)
    *of_rows, of_visual = backward_op(grad, *plan, *sources)
    return (*of_rows, None, None, None, None, of_visual)


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    derivative = Derivative(ops.lape_scatter_backward.default, tensors=9, call=_call_backward)
    register_autograd(registry, ops.lape_scatter.default, derivative)
    torch.library.register_fake(f"{namespace}::{_OP}", _fake, lib=registry)
    torch.library.register_fake(f"{namespace}::{_BACKWARD}", _fake_backward, lib=registry)


add_rules(_register)
register_python_kernels(_OP, _OP, reference.lape_scatter, _check)
register_python_kernels(_BACKWARD, _BACKWARD, reference.lape_scatter_backward, _check_backward)
