"""linear_lape_gelu and gelu_linear_gradient: matrix products of torch, and a Triton kernel behind each.

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. What is launched depends on shapes, dtypes and strides alone, and nothing is read back from the device, so that
calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launching
from .launching import next_power_of_2, normalized_strides, on_device_of

# Elements of a tile, 16 per thread, and frames per program.
_TILE = 2048
_TILE_CHANNELS = 512
_FRAMES = 8


def _blocks(rows: int, channels: int) -> tuple[int, int, int]:
    """Rows and channels per tile, and warps."""
    block_channels = min(next_power_of_2(channels), _TILE_CHANNELS)
    block_rows = min(next_power_of_2(rows), _TILE // block_channels)
    return block_rows, block_channels, max(1, block_rows * block_channels * 4 // _TILE)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices of one dtype, in that dtype, contiguous."""
    return torch.mm(a, b, out=torch.empty((len(a), b.shape[1]), dtype=a.dtype, device=a.device))


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
    where it is not kept. The product is rounded to the dtype of features, what follows is computed in fp32."""
    from .lape_mlp_kernels import Positions, position_gelu_kernel

    batch, *sizes, _ = features.shape
    channels = len(weight)
    shape = (batch, *sizes, channels)
    with on_device_of(features):
        activation = _product(features.flatten(0, 3), weight.t()).view(shape)
        kept = torch.empty(shape if keep_preactivation else (0,), dtype=features.dtype, device=features.device)
        if activation.numel() == 0:
            return activation, kept
        frames = batch * sizes[0]
        block_w, block_channels, warps = _blocks(sizes[2], channels)
        width_blocks, channel_blocks = -(-sizes[2] // block_w), -(-channels // block_channels)
        tables = (temporal, height, width)
        launching.launch(
            position_gelu_kernel,
            (-(-frames // _FRAMES) * sizes[1] * width_blocks * channel_blocks,),
            activation,
            kept,
            Positions(bias, *tables, normalized_strides(bias, 1), *(normalized_strides(table, 2) for table in tables)),
            tuple(sizes),
            frames,
            channels,
            width_blocks,
            channel_blocks,
            KEEP=keep_preactivation,
            FRAMES=_FRAMES,
            BLOCK_W=block_w,
            BLOCK_C=block_channels,
            num_warps=warps,
        )
    return activation, kept


def gelu_linear_gradient(grad_output: Tensor, weight: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    """grad_output `[tokens, M]`, weight `[M, N]`, preactivation x `[tokens, N]` -> the gradient of x where
    `gelu(x) weight^T` has the gradient grad_output, and gelu(x), both `[tokens, N]`."""
    from .lape_mlp_kernels import gelu_gradient_kernel

    tokens, channels = preactivation.shape
    with on_device_of(preactivation):
        gradient = _product(grad_output, weight)
        activation = torch.empty(preactivation.shape, dtype=preactivation.dtype, device=preactivation.device)
        if activation.numel() == 0:
            return gradient, activation
        block_tokens, block_channels, warps = _blocks(tokens, channels)
        channel_blocks = -(-channels // block_channels)
        launching.launch(
            gelu_gradient_kernel,
            (-(-tokens // block_tokens) * channel_blocks,),
            gradient,
            preactivation,
            activation,
            normalized_strides(preactivation, 2),
            tokens,
            channels,
            channel_blocks,
            BLOCK_TOKENS=block_tokens,
            BLOCK_C=block_channels,
            num_warps=warps,
        )
    return gradient, activation
