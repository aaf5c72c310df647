"""Triton kernels of what stands between the matrix products of an MLP; `lape_mlp.py` beside this file launches them.

Everything is widened to fp32 when it is loaded. Every element of a result is written by one program, once.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Positions(NamedTuple):
    """What is added to products: pointers and strides of the bias and of one row per frame, row and column."""

    bias: Any
    temporal: Any
    height: Any
    width: Any
    bias_strides: tuple[int]
    temporal_strides: tuple[int, int]
    height_strides: tuple[int, int]
    width_strides: tuple[int, int]


@triton.jit
def _below(x):
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _load_row(table, strides, row, channel, mask):
    return tl.load(table + (row.to(tl.int64) * strides[0] + channel * strides[1]), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sizes", "frames", "width_blocks", "channel_blocks"])
def position_gelu_kernel(
    activation,
    preactivation,
    positions,
    sizes,
    frames,
    channels,
    width_blocks,
    channel_blocks,
    KEEP: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turns products `[frames, H, W, channels]` into activations in place; where they are kept, preactivations go to
    another such tensor. A program takes a part of a row of the grid in `FRAMES` frames of all `frames = B T`: what is
    the same in all of them is loaded once."""
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // channel_blocks
    w = program % width_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program = program // width_blocks
    h = program % sizes[1]
    first = program // sizes[1] * FRAMES
    exists = channel < channels
    mask = (w < sizes[2])[:, None] & exists[None, :]
    channel = channel.to(tl.int64)
    bias = tl.load(positions.bias + channel * positions.bias_strides[0], mask=exists, other=0.0).to(tl.float32)
    h_row = _load_row(positions.height, positions.height_strides, h, channel, exists)
    same = _load_row(positions.width, positions.width_strides, w[:, None], channel[None, :], mask)
    same += (h_row + bias)[None, :]
    for frame in range(first, tl.minimum(first + FRAMES, frames)):
        t = frame % sizes[0]
        t_row = _load_row(positions.temporal, positions.temporal_strides, t, channel, exists)
        row = (tl.cast(frame, tl.int64) * sizes[1] + h) * sizes[2] + w
        offsets = row[:, None] * channels + channel[None, :]
        x = tl.load(activation + offsets, mask=mask, other=0.0).to(tl.float32) + (same + t_row[None, :])
        if KEEP:
            tl.store(preactivation + offsets, x.to(preactivation.dtype.element_ty), mask=mask)
        tl.store(activation + offsets, (x * _below(x)).to(activation.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "channel_blocks"])
def gelu_gradient_kernel(
    gradient,
    preactivation,
    activation,
    preactivation_strides,
    tokens,
    channels,
    channel_blocks,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turns gradients of activations `[tokens, channels]` into those of preactivations in place, and calculates the
    activations again. Only preactivations may be strided."""
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = (program // channel_blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask = (token < tokens)[:, None] & (channel < channels)[None, :]
    token, channel = token[:, None], channel.to(tl.int64)[None, :]
    here = token * preactivation_strides[0] + channel * preactivation_strides[1]
    x = tl.load(preactivation + here, mask=mask, other=0.0).to(tl.float32)
    offsets = token * channels + channel
    grad = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
    below = _below(x)
    density = tl.exp(x * x * -0.5) * 0.3989422804014327
    tl.store(gradient + offsets, (grad * (below + x * density)).to(gradient.dtype.element_ty), mask=mask)
    tl.store(activation + offsets, (x * below).to(activation.dtype.element_ty), mask=mask)
