"""Linear layer and cross entropy over words and anchors, without ever holding the logits.

The native ops are `torch.ops.llava_st.coordinate_cross_entropy`, which gives what each token loses and the logsumexp of
its logits, and `coordinate_cross_entropy_backward`, which computes the logits once more, tile by tile. Reductions are
torch's own ops on the losses.

A tensor-parallel head would go between the two results: each rank has the logsumexp of its own classes and the target's
logit where it holds it; both are combined across ranks before the loss is taken, and the backward op takes the combined
logsumexp as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import reference
from ..reference.coordinate_loss import check_labels, check_loss, check_reduction, check_sample, reduce_losses
from . import checks
from .dispatch import computing_tables, register_python_kernels, run, with_defaults
from .registration import Derivative, add_rules, autocast, register_autocast, register_autograd

_OP = "coordinate_cross_entropy"
_BACKWARD = "coordinate_cross_entropy_backward"
_SOURCES = 5  # hidden, weight and the tables: what has a gradient


def coordinate_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    sample: Tensor | None = None,
) -> Tensor:
    """The loss of tokens whose labels are words, or fractional positions on an axis, from hidden states.

    The classes are V words, then n anchors of temporal, m of height and m' of width. A coordinate has two: the anchors
    f and g around it, with weights `1 - r` and `r` (f, g and r as in `lape_scatter`). A token loses
    `logsumexp(z) - (1 - r) z[f] - r z[g]`; of a word, `logsumexp(z) - z[label]`. Of each token the first that applies
    counts:

    1. `labels == ignore_index`: nothing; the token is not active.
    2. `axis >= 0`: the anchors of that axis around `positions`, clipped to [0, 1]. The label is not read; the class of
       the template token gets no weight.
    3. The class of its label, which may be a single anchor as well.

    Args:
        hidden: `[N, C]`, or `[B, L, C]`; float32, bfloat16, float16, or on a CPU float64. Under autocast hidden, weight
            and tables are cast to its dtype.
        weight: `[V, C]`, the head, without bias, in the dtype of hidden.
        temporal: `[n, C]`. The tables share a dtype, which may be another than that of hidden.
        height: `[m, C]`.
        width: `[m', C]`.
        labels: int32 or int64 `[N]` (`[B, L]`), already shifted: each token has the label of the next.
        axis: int8, of the same shape, of the labels: -1 none, 0 temporal, 1 height, 2 width.
        positions: float64, of the same shape, of the labels. No gradient flows into them.
        reduction: where no token is active each gives 0, with zero gradients.
            "mean": over active tokens; "sum": over active tokens; "none": one loss per token, 0 where not active;
            "per_sample_sum": over samples, of the means over each one's active tokens, as published; one without active
            tokens counts as 0; "per_sample_mean": that by the number of samples.
        normalizer: for "mean" only: a positive number, or a tensor with one, in place of the number of active tokens:
            of all those that a step of gradient accumulation sees (`num_items_in_batch` of transformers).
        ignore_index: the label of tokens that are not active.
        sample: int32 or int64 `[N]`, for the reductions per sample: which sample each token belongs to, numbers from 0
            in any order. With labels `[B, L]` it is b by default. It is read back to the host.

    Returns:
        A float32 scalar (float64 for float64 hidden); for "none" of the shape of labels. Softmax and sums are in
        float32 (float64) whatever the dtype of hidden. Differentiable once, in hidden, weight and tables.

    Memory: besides the gradients that are wanted, a tile of logits of at most 32 MiB and a few vectors. The gradient of
    a class is summed over all tokens in float32 before it is rounded.

    Tokens that are not active are left out before anything is computed, which waits for the GPU once; not so under
    torch.compile or while a CUDA graph is captured, where they take part with weight 0.

    Raises:
        ValueError: shapes or devices that do not fit, another reduction, a normalizer that is not positive. Where the
            token tensors are on the CPU: a label or an axis out of range, or NaN as the position of an active token
            with an axis; the message names the token. On a GPU these make a loss of NaN.
        TypeError: dtypes that do not fit.
        BackendError, torch.OutOfMemoryError: as in `lape_add`.

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2; two-bin targets are Momentor's (arXiv:2402.11435).
    """
    tables: Sequence[Tensor] = (temporal, height, width)
    hidden, weight, *tables = autocast(hidden, weight, *tables)
    tokens = (labels, axis, positions)
    _check_sources(_OP, hidden, weight, tables)
    check_loss(_OP, hidden, weight, tables, *tokens)
    _check_devices(_OP, hidden, tokens)
    active = labels != ignore_index
    check_reduction(_OP, reduction, normalizer, active)
    if checks.can_read(*tokens):
        check_labels(_OP, len(weight) + sum(map(len, tables)), *tokens, ignore_index)
    sample, samples = _samples(reduction, sample, labels)

    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    flat = [tensor.reshape(-1) for tensor in tokens]
    kept = active.reshape(-1).nonzero().squeeze(1) if _can_wait_for(labels) else None
    if kept is not None:
        rows = rows.index_select(0, kept)
        flat = [tensor.index_select(0, kept) for tensor in flat]
    else:
        rows = rows.masked_fill(~active.reshape(-1, 1), 0)  # what is not active takes no part, even if it is NaN
    arguments = (rows, weight, *computing_tables(tables, hidden), *flat, ignore_index)
    losses, _ = run(_OP, arguments, reference.coordinate_losses)
    if kept is not None:
        losses = losses.new_zeros(labels.numel()).index_put((kept,), losses)
    reduced = reduce_losses(losses, active.reshape(-1), reduction, normalizer, sample, samples)
    return reduced.view(labels.shape) if reduction == "none" else reduced


def _samples(reduction: str, sample: Tensor | None, labels: Tensor) -> tuple[Tensor | None, int]:
    """The sample of each token, and how many there are, where the reduction asks."""
    if sample is None and labels.dim() > 1 and reduction.startswith("per_sample"):
        number = torch.arange(labels.shape[0], device=labels.device)
        return number.repeat_interleave(labels[0].numel() if len(labels) else 0), labels.shape[0]
    return sample, check_sample(_OP, reduction, sample, labels.numel())


def _can_wait_for(tensor: Tensor) -> bool:
    """Whether the host can wait for what depends on the contents of a tensor."""
    if torch.compiler.is_compiling() or is_fake(tensor) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


# What torch needs to know --------------------------------------------------------------------------------------------


def _check_sources(op: str, hidden: Tensor, weight: Tensor, tables: Sequence[Tensor]) -> None:
    if hidden.dim() < 2:
        raise ValueError(f"{op}: hidden must have at least 2 dimensions [..., C], got {list(hidden.shape)}")
    checks.check_floating(op, "hidden", hidden)
    checks.check_rank(op, "weight", weight, 2, "[V, C]")
    checks.check_same_kind(op, "weight", weight, "hidden", hidden)
    checks.check_tables(op, tables, hidden.shape[-1], "hidden", hidden)


def _check_devices(op: str, hidden: Tensor, tokens: Sequence[Tensor]) -> None:
    for name, tensor in zip(("labels", "axis", "positions"), tokens, strict=True):
        checks.check_same_device(op, name, tensor, "hidden", hidden)


def _check(op: str, arguments: Sequence[Any]) -> None:
    hidden, weight, *tables, labels, axis, positions = arguments[:8]
    checks.check_rank(op, "hidden", hidden, 2, "[N, C]")
    _check_sources(op, hidden, weight, tables)
    check_loss(op, hidden, weight, tables, labels, axis, positions)
    _check_devices(op, hidden, (labels, axis, positions))


def _check_backward(op: str, arguments: Sequence[Any]) -> None:
    grad_losses, logsumexp, *others = arguments
    _check(op, others)
    for name, tensor in (("grad_losses", grad_losses), ("logsumexp", logsumexp)):
        checks.check_shape(op, name, tensor, others[0].shape[:1])


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(_OP, arguments)
    hidden = arguments[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    return losses, torch.empty_like(losses)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_backward(_BACKWARD, arguments)
    of_hidden, of_weight, of_tables = arguments[-3:]
    wanted = (of_hidden, of_weight, of_tables, of_tables, of_tables)
    sources = arguments[2 : 2 + _SOURCES]
    return tuple(source.new_empty(source.shape if want else 0) for source, want in zip(sources, wanted, strict=True))


def _call_backward(
    backward_op: torch._ops.OpOverload, grad: Tensor, outputs: Any, arguments: Sequence[Any], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    _, logsumexp = outputs
    arguments = with_defaults(_OP, tuple(arguments))
    return backward_op(grad, logsumexp, *arguments, needed[0], needed[1], any(needed[2:]))


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    forward_op, backward_op = ops.coordinate_cross_entropy.default, ops.coordinate_cross_entropy_backward.default
    derivative = Derivative(backward_op, tensors=_SOURCES, call=_call_backward, saves_outputs=True)
    register_autograd(registry, forward_op, derivative)
    register_autocast(registry, forward_op, tensors=_SOURCES)
    torch.library.register_fake(f"{namespace}::{_OP}", _fake, lib=registry)
    torch.library.register_fake(f"{namespace}::{_BACKWARD}", _fake_backward, lib=registry)


add_rules(_register)
register_python_kernels(_OP, _OP, reference.coordinate_losses, _check)
register_python_kernels(_BACKWARD, _BACKWARD, reference.coordinate_losses_backward, _check_backward)
