"""Neighbouring-token propagation: a table as it is, whose rows share their gradients with their neighbours.

Its gradient is the op `torch.ops.llava_st.propagate_to_neighbors`, a symmetric linear map and so its own derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import checks
from .dispatch import register_python_kernels, run
from .registration import add_rules, is_transformed, register_self_adjoint

_OP = "propagate_to_neighbors"


def neighboring_token_propagation(table: Tensor, *, compat: str = "paper") -> Tensor:
    """The table itself; but a gradient `g` of the result becomes `(I + M) g` of the table, `M_ij = 2^-|i-j|`.

    What one anchor learns its neighbours learn by halves. Linear in time and exact; sums are taken in float32, in
    float64 for float64, and rounded once.

    Args:
        table: `[n, C]`, one row per anchor; float32, bfloat16, float16, or on a CPU float64.
        compat: `"paper"`, or `"released"`: the result is `(W + R) - R` with `R = M W`, each rounded to the dtype of
            the table, as the published code computes it. The gradient is the same.

    Returns:
        `[n, C]`. Differentiable any number of times.

    Raises:
        ValueError: a table of another rank; another word for `compat`.
        TypeError: a table that is not of a floating point dtype.

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2; the formula is Momentor's (arXiv:2402.11435).
    """
    checks.check_rank("neighboring_token_propagation", "table", table, 2, "[anchors, C]")
    checks.check_floating("neighboring_token_propagation", "table", table)
    if compat not in ("paper", "released"):
        raise ValueError(f"neighboring_token_propagation: compat must be 'paper' or 'released', got {compat!r}")
    if not torch.compiler.is_compiling() and is_transformed(table):
        return reference.neighboring_token_propagation(table, compat=compat)
    return _SharedGradient.apply(table, compat == "released")


class _SharedGradient(torch.autograd.Function):
    """Without a `jvp`: Dynamo traces no function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, released: bool) -> Tensor:
        if released:
            return reference.neighboring_token_propagation(table, compat="released")
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        pass  # the map is linear: nothing to save

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _propagate(grad), None


def _propagate(x: Tensor) -> Tensor:
    """`(I + M) x` for x `[n, C]`."""
    return run(_OP, (x,), reference.propagate_to_neighbors)


# What torch needs to know --------------------------------------------------------------------------------------------


def _check(op: str, arguments: tuple[Any, ...]) -> None:
    checks.check_rank(op, "x", arguments[0], 2, "[anchors, C]")


def _fake(x: Tensor) -> Tensor:
    _check(_OP, (x,))
    return x.new_empty(x.shape)


def _vmap_rule(op: torch._ops.OpOverload) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int]:
        """Channels do not know of each other: the mapped dimension becomes more of them."""
        x = x.movedim(in_dims[0], 1)
        return op(x.flatten(1)).unflatten(1, x.shape[1:]), 1

    return rule


def _register(namespace: str, registry: torch.library.Library) -> None:
    op = getattr(torch.ops, namespace).propagate_to_neighbors.default
    register_self_adjoint(registry, op)
    torch.library.register_vmap(op, _vmap_rule(op), lib=registry)
    torch.library.register_fake(f"{namespace}::{_OP}", _fake, lib=registry)


add_rules(_register)
register_python_kernels(_OP, "propagate_to_neighbors", reference.propagate_to_neighbors, _check)
