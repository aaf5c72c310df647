"""Two-layer MLPs of a video's features whose first layer also sees where each feature is.

The native ops are `torch.ops.llava_st.linear_lape_gelu`, the first layer with all that follows it up to the GELU, and
`gelu_linear_gradient`, the way back through the second layer and the GELU. They have no gradient of their own:
`lape_mlp` is made of them and has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose, use_backend
from ..reference.lape import computing_dtype
from . import checks
from .dispatch import computing_tables, register_python_kernels, run, with_defaults
from .registration import add_rules, autocast, is_transformed, register_without_gradient

_FORWARD = "linear_lape_gelu"
_GRADIENT = "gelu_linear_gradient"


def lape_mlp(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    second_weights: Sequence[Tensor],
    second_biases: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Several MLPs of the same features, side by side: `gelu(features weight^T + bias + position) second_weight^T +
    second_bias`, with the exact (erf) GELU.

    Training keeps the features and, per feature, the numbers that go into the GELU; what comes out of it is calculated
    again.

    Args:
        features: `[B, T, H, W, K]`; float32, bfloat16, float16, or on a CPU float64.
        weight: `[G N, K]`: the first layers of G MLPs.
        bias: `[G N]`. Biases and positions may be of another floating point dtype than features; they share one.
        positions: three tables, `[T, G N]`, `[H, G N]` and `[W, G N]`: one row each for every frame, row and column.
        second_weights: G matrices `[M, N]`.
        second_biases: G vectors `[M]`.

    Returns:
        G tensors `[B, T, H, W, M]` in the dtype of features. Differentiable once.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        torch.OutOfMemoryError: no memory for the results.

    Source: the key and value MLPs of TokenPacker (arXiv:2407.02392) and LLaVA-ST (arXiv:2501.08282), with the second
    layer of the projector before them and the positions of the latter folded in (docs/folding.md).
    """
    features, weight, *second = autocast(features, weight, *second_weights, *second_biases)
    count = len(second_weights)
    second_weights, second_biases = second[:count], second[count:]
    bias, *positions = computing_tables((bias, *positions), features)
    _check(_FORWARD, (features, weight, bias, *positions))
    _check_second("lape_mlp", weight, second_weights, second_biases)
    tensors = (features, weight, bias, *positions, *second_weights, *second_biases)
    if not features.is_meta and _takes_the_reference(tensors):
        activation, _ = reference.linear_lape_gelu(features, weight, bias, *positions)
        return tuple(_second_layers(activation, second_weights, second_biases))
    return _LapeMlp.apply(count, *tensors)


def _takes_the_reference(tensors: Sequence[Tensor]) -> bool:
    if not torch.compiler.is_compiling() and is_transformed(*tensors):
        return True
    return choose(_FORWARD, tensors[0]) == "reference"


class _LapeMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, weight, _, temporal, height, width = first = tensors[:6]
        second_weights, second_biases = tensors[6 : 6 + count], tensors[6 + count :]
        needed = any(ctx.needs_input_grad)
        activation, preactivation = run(_FORWARD, (*first, needed), reference.linear_lape_gelu)
        if needed:
            ctx.save_for_backward(features, weight, temporal, height, width, preactivation, *second_weights)
            # Autograd may call the backward pass in a thread of its own, which knows nothing of a forced backend.
            ctx.backend = "reference" if features.is_meta else choose(_FORWARD, features)
        return tuple(_second_layers(activation, second_weights, second_biases))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (ctx.needs_input_grad[1:], *ctx.saved_tensors, *grad_outputs)
        if torch.compiler.is_compiling():
            return None, *_gradients(*arguments)
        # Its own backward pass is an error, but only where it is wanted.
        backward = _LapeMlpBackward.apply if torch.is_grad_enabled() else _gradients
        with use_backend(ctx.backend):
            return None, *backward(*arguments)


class _LapeMlpBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "lape_mlp: double backward is not supported by the kernels; run the forward under "
            "llava_st_ops.use_backend('reference') to differentiate twice"
        )


def _gradients(needed: Sequence[bool], *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """Of all tensors of the forward pass, None where not needed."""
    features, weight, temporal, height, width, preactivation, *rest = tensors
    count = len(rest) // 2
    second_weights, grad_outputs = rest[:count], rest[count:]
    needs_features, needs_weight, needs_bias, *needs_positions = needed[:6]
    rows = features.reshape(features.shape[:4].numel(), features.shape[-1])
    preactivation = preactivation.flatten(0, -2)
    grad_features = None
    parts = []  # of each MLP: the gradients of its first layer, its positions, and its second layer
    for number, (grad, second) in enumerate(zip(grad_outputs, second_weights, strict=True)):
        grad = grad.reshape(len(rows), grad.shape[-1])
        before = preactivation.chunk(count, -1)[number]
        grad_before, activation = run(_GRADIENT, (grad, second, before), reference.gelu_linear_gradient)
        grad_second = grad.t() @ activation if needed[6 + number] else None
        del activation  # large
        grad_weight = grad_before.t() @ rows if needs_weight else None
        sums = (None, None, None)
        if needs_bias or any(needs_positions):
            tables = [table.chunk(count, -1)[number] for table in (temporal, height, width)]
            sums = _sums_over_grid(grad_before.unflatten(0, features.shape[:4]), tables)
        if needs_features:
            first = weight.chunk(count)[number]
            grad_features = grad_before @ first if grad_features is None else grad_features.addmm_(grad_before, first)
        parts.append((grad_weight, *sums, grad_second, grad.sum(0)))
    grad_weights, *sums, grad_second_weights, grad_second_biases = zip(*parts, strict=True)
    dtype = temporal.dtype
    return (
        grad_features.view(features.shape) if needs_features else None,
        torch.cat(grad_weights) if needs_weight else None,
        torch.cat([x.sum(0) for x in sums[0]]).to(dtype) if needs_bias else None,
        *(torch.cat(x, -1).to(dtype) if need else None for x, need in zip(sums, needs_positions, strict=True)),
        *grad_second_weights,
        *grad_second_biases,
    )


def _sums_over_grid(x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Sums of x `[B, T, H, W, N]` over all but the frame, the row and the column, in float32 or better."""
    wide = computing_dtype(x.dtype)
    return run("lape_add_backward", (x, *(table.to(wide) for table in like), False), _plain_sums)


def _plain_sums(x: Tensor, temporal: Tensor, height: Tensor, width: Tensor, _: bool) -> tuple[Tensor, ...]:
    over = (((0, 2, 3), temporal), ((0, 1, 3), height), ((0, 1, 2), width))
    return tuple(x.sum(dims, dtype=table.dtype) for dims, table in over)


def _second_layers(activation: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # As matrices: of strided rows in more dimensions torch makes a product, and adds the bias apart.
    parts = activation.flatten(0, -2).chunk(len(weights), -1)
    layers = zip(parts, weights, biases, strict=True)
    return tuple(torch.addmm(bias, x, weight.t()).unflatten(0, activation.shape[:-1]) for x, weight, bias in layers)


# What torch needs to know --------------------------------------------------------------------------------------------


def _check(op: str, arguments: Sequence[Any]) -> None:
    features, weight, bias, *positions = arguments[:6]
    checks.check_rank(op, "features", features, 5, "[B, T, H, W, K]")
    checks.check_floating(op, "features", features)
    checks.check_rank(op, "weight", weight, 2, "[N, K]")
    checks.check_shape(op, "weight", weight, (weight.shape[0], features.shape[-1]))
    checks.check_same_kind(op, "weight", weight, "features", features)
    checks.check_tables(op, positions, weight.shape[0], "features", features)
    for name, table, size in zip(("temporal", "height", "width"), positions, features.shape[1:4], strict=True):
        checks.check_shape(op, name, table, (size, weight.shape[0]))
    checks.check_shape(op, "bias", bias, weight.shape[:1])
    checks.check_same_kind(op, "bias", bias, "temporal", positions[0])


def _check_second(op: str, weight: Tensor, second_weights: Sequence[Tensor], second_biases: Sequence[Tensor]) -> None:
    count = len(second_weights)
    if count == 0 or weight.shape[0] % count or len(second_biases) != count:
        raise ValueError(
            f"{op}: second_weights and second_biases must be as many, and divide the {weight.shape[0]} rows of weight, "
            f"got {count} and {len(second_biases)}"
        )
    for second_weight, second_bias in zip(second_weights, second_biases, strict=True):
        checks.check_rank(op, "each of second_weights", second_weight, 2, "[M, N]")
        shape = (second_weights[0].shape[0], weight.shape[0] // count)
        checks.check_shape(op, "each of second_weights", second_weight, shape)
        checks.check_shape(op, "each of second_biases", second_bias, shape[:1])
        for name, tensor in (("second_weights", second_weight), ("second_biases", second_bias)):
            checks.check_same_kind(op, f"each of {name}", tensor, "weight", weight)


def _check_gradient(op: str, arguments: Sequence[Any]) -> None:
    grad_output, weight, preactivation = arguments
    checks.check_rank(op, "preactivation", preactivation, 2, "[tokens, N]")
    checks.check_floating(op, "preactivation", preactivation)
    tokens, channels = preactivation.shape
    checks.check_rank(op, "weight", weight, 2, "[M, N]")
    checks.check_shape(op, "weight", weight, (weight.shape[0], channels))
    checks.check_shape(op, "grad_output", grad_output, (tokens, weight.shape[0]))
    for name, tensor in (("weight", weight), ("grad_output", grad_output)):
        checks.check_same_kind(op, name, tensor, "preactivation", preactivation)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(_FORWARD, arguments)
    features, weight, *_, keep_preactivation = with_defaults(_FORWARD, arguments)
    shape = (*features.shape[:4], weight.shape[0])
    return features.new_empty(shape), features.new_empty(shape if keep_preactivation else 0)


def _fake_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check_gradient(_GRADIENT, arguments)
    shape = arguments[2].shape
    return arguments[2].new_empty(shape), arguments[2].new_empty(shape)


def _register(namespace: str, registry: torch.library.Library) -> None:
    ops = getattr(torch.ops, namespace)
    for name, fake in ((_FORWARD, _fake), (_GRADIENT, _fake_gradient)):
        register_without_gradient(registry, getattr(ops, name).default, instead="llava_st_ops.lape_mlp")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=registry)


add_rules(_register)
register_python_kernels(_FORWARD, _FORWARD, reference.linear_lape_gelu, _check)
register_python_kernels(_GRADIENT, _GRADIENT, reference.gelu_linear_gradient, _check_gradient)
