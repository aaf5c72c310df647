"""A linear layer at positions of a grid with its GELU, and the way back through a GELU and the layer behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .lape import computing_dtype


def linear_lape_gelu(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    keep_preactivation: bool = False,
) -> tuple[Tensor, Tensor]:
    """features `[B, T, H, W, K]`, weight `[N, K]`, bias `[N]`, temporal `[T, N]`, height `[H, N]`, width `[W, N]` ->
    gelu(x), x, both `[B, T, H, W, N]`, with `x = features weight^T + bias + temporal + height + width`; x is `[0]`
    where it is not kept."""
    wide = computing_dtype(features.dtype)
    positions = temporal.to(wide)[:, None, None] + height.to(wide)[:, None] + width.to(wide) + bias.to(wide)
    preactivation = torch.nn.functional.linear(features, weight).to(wide) + positions
    activation = torch.nn.functional.gelu(preactivation).to(features.dtype)
    kept = preactivation.to(features.dtype) if keep_preactivation else features.new_empty(0)
    return activation, kept


def gelu_linear_gradient(grad_output: Tensor, weight: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    """grad_output `[tokens, M]`, weight `[M, N]`, preactivation x `[tokens, N]` -> the gradient of x where
    `gelu(x) weight^T` has the gradient grad_output, and gelu(x), both `[tokens, N]`."""
    wide = computing_dtype(preactivation.dtype)
    x = preactivation.to(wide)
    below = (1 + torch.erf(x * math.sqrt(0.5))) / 2  # the normal distribution function
    density = torch.exp(x.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
    grad_activation = torch.matmul(grad_output, weight).to(wide)
    grad = grad_activation * (below + x * density)
    return grad.to(preactivation.dtype), (x * below).to(preactivation.dtype)
