"""Region attention over keys and values that all heads share, normalised on the way: what is left of a packer's
attention when its in-projections have moved to the queries and behind the pooling.

The native ops are `torch.ops.llava_st.normalized_region_attention` and its `_backward`.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .dispatch import register_python_kernels, run, with_defaults
from .registration import Derivative, add_rules, autocast, register_autocast, register_autograd

_OP = "normalized_region_attention"
_BACKWARD = f"{_OP}_backward"


def normalized_region_attention(
    query: Tensor, key: Tensor, value: Tensor, region: Sequence[int], eps: float = 1e-5
) -> Tensor:
    """Attention of each query over the normalised tokens of its own region; all heads see the same tokens.

    For each region and head `softmax_j(query . n(key_j))` weighs `n(value_j)`, where `n(x) = (x - mean) / sqrt(var +
    eps)` is a LayerNorm without scale and shift. Nothing is scaled: what multiplies the scores, a LayerNorm's scale and
    an in-projection belong into the query, and what follows the pooling behind it (docs/folding.md). Keys and values
    are read once and never written normalised.

    Args:
        query: `[B, T', H', W', heads, E]`, one per region: `T' = ceil(T / rt)` and so on. Any number of heads.
        key: `[B, T, H, W, E]`.
        value: `[B, T, H, W, E]`.
        region: tokens per region along time, height and width; regions at the far edges may be partial.
        eps: added to the variances.

    All three tensors share device and dtype (float32, bfloat16 or float16; float64 too on a CPU); under autocast they
    are cast to its dtype. They may be strided in any way; where the last dimension is not contiguous they are copied
    first. Means, variances and sums are taken in float32, in float64 for float64. The result is the same in every run.

    Returns:
        `[B, T', H', W', heads, E]`, contiguous, in the dtype of `query`. Differentiable once; for double backward and
        the transforms of torch.func the reference runs instead, or is to be asked for (`use_backend("reference")`).

    Raises:
        ValueError: shapes, devices, `region` or `eps` that do not fit.
        TypeError: dtypes that do not fit.
        BackendError: `use_backend` forces a backend that cannot run here.
        torch.OutOfMemoryError: no memory for the result.

    Source: the attention of TokenPacker (arXiv:2407.02392) and LLaVA-ST (arXiv:2501.08282), rearranged.
    """
    query, key, value = autocast(query, key, value)
    arguments = (query, key, value, region, eps)
    _check(_OP, arguments)
    return run(_OP, (query, key, value, list(region), float(eps)), reference.normalized_region_attention)


def _check(op: str, arguments: tuple[Any, ...]) -> None:
    """Checks the arguments of either op."""
    *grad_output, query, key, value, region, eps = with_defaults(op, arguments)
    checks.check_region(op, region)
    checks.check_rank(op, "query", query, 6, "[B, T', H', W', heads, E]")
    checks.check_rank(op, "key", key, 5, "[B, T, H, W, E]")
    checks.check_floating(op, "query", query)
    checks.check_same_kind(op, "key", key, "query", query)
    checks.check_same_kind(op, "value", value, "query", query)
    checks.check_shape(op, "value", value, key.shape)
    batch, *grid, width = key.shape
    checks.check_shape(op, "query", query, (batch, *checks.regions_of(grid, region), query.shape[4], width))
    if width == 0:
        raise ValueError(f"{op}: key must have at least one channel to normalise over, got {list(key.shape)}")
    if not isinstance(eps, numbers.Real) or not 0 <= eps <= sys.float_info.max:
        raise ValueError(f"{op}: eps must be a finite number, not below 0, got {eps!r}")
    if grad_output:
        checks.check_grad_output(op, grad_output[0], query)


def _fake(*arguments: Any) -> Tensor:
    _check(_OP, arguments)
    return arguments[0].new_empty(arguments[0].shape)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check(_BACKWARD, arguments)
    return tuple(x.new_empty(x.shape) for x in arguments[1:4])


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    forward_op, backward_op = getattr(ops, _OP).default, getattr(ops, _BACKWARD).default
    register_autograd(registry, forward_op, Derivative(backward_op, tensors=3))
    register_autocast(registry, forward_op, tensors=3)
    torch.library.register_fake(f"{namespace}::{_OP}", _fake, lib=registry)
    torch.library.register_fake(f"{namespace}::{_BACKWARD}", _fake_backward, lib=registry)


add_rules(_register)
register_python_kernels(_OP, _OP, reference.normalized_region_attention, _check)
register_python_kernels(_BACKWARD, _BACKWARD, reference.normalized_region_attention_backward, _check)
