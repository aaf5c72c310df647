"""Launches the Triton kernels of lape_scatter and its backward.

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. The launch depends on shapes, dtypes and strides alone, and nothing is read back from the device, so that calls
can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launching
from .launching import next_power_of_2, normalized_strides, on_device_of

_CHANNELS = 1024  # per program: 8 per thread
# Entries that a program of the backward kernel has in flight.
_ENTRIES = 4


def _blocks(channels: int) -> tuple[int, int]:
    """Channels per program, and warps."""
    block_channels = min(next_power_of_2(channels), _CHANNELS)
    return block_channels, max(1, block_channels * 4 // _CHANNELS)


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
    """embed `[V, C]`, tables `[n, C]`, `[m, C]`, `[m', C]` of one dtype, input_ids, axis, positions and visual_index
    `[N]`, visual `[M, C]` -> `[N, C]` in the dtype of embed and visual.

    A token whose visual_index, axis, id or position is none gets a row of NaN: on the device there is nobody to tell.
    """
    from .scattering_kernels import Sources, Tokens, scatter_kernel

    count, channels = len(input_ids), embed.shape[1]
    output = torch.empty((count, channels), dtype=embed.dtype, device=embed.device)
    if output.numel() == 0:
        return output
    sources = (embed, temporal, height, width, visual)
    tokens = (input_ids, axis, positions, visual_index)
    block_channels, warps = _blocks(channels)
    with on_device_of(embed):
        launching.launch(
            scatter_kernel,
            (count, -(-channels // block_channels)),
            Sources(*sources, tuple(normalized_strides(x, 2) for x in sources), tuple(map(len, sources))),
            Tokens(*tokens, tuple(x.stride(0) for x in tokens)),
            output,
            channels,
            BLOCK_C=block_channels,
            num_warps=warps,
        )
    return output


def lape_scatter_backward(
    grad_output: Tensor,
    destination: Tensor,
    token: Tensor,
    share: Tensor,
    embed: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    visual: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of embed, the three tables and visual, of their shapes and dtypes.

    Their rows are numbered through in this order. Each entry, of `[entries]` that ascend by `destination`, adds row
    `token` of grad_output, times `share`, to row `destination`; what has a destination past the last row is dropped.
    Rows are added up in fp32, in an order that depends on nothing but their number, and rounded once. Entries of a
    token that does not exist are NaN.
    """
    from .scattering_kernels import gather_kernel

    sources = (embed, temporal, height, width, visual)
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources)
    tokens, channels = grad_output.shape
    if channels == 0:
        return gradients
    block_channels, warps = _blocks(channels)
    token, share = token.contiguous(), share.contiguous()
    with on_device_of(grad_output):
        # Where the entries of each destination begin: a binary search on the device, which is not waited for.
        destinations = torch.arange(sum(map(len, sources)) + 1, device=grad_output.device)
        bounds = torch.searchsorted(destination.contiguous(), destinations)
        first_row = 0
        for gradient in gradients:
            if len(gradient):
                launching.launch(
                    gather_kernel,
                    (len(gradient), -(-channels // block_channels)),
                    grad_output,
                    bounds,
                    token,
                    share,
                    gradient,
                    normalized_strides(grad_output, 2),
                    first_row,
                    tokens,
                    channels,
                    ENTRIES=_ENTRIES,
                    BLOCK_C=block_channels,
                    num_warps=warps,
                )
            first_row += len(gradient)
    return gradients
