"""y = (I + M) x along the rows of a matrix, M_ij = 2^-|i-j|, in linear time.

With f_i = x_i + f_(i-1) / 2 and b_i = x_i + b_(i+1) / 2, y_i is f_i + b_i. One program per block of channels; the f_i
go through memory, in float.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def propagate_kernel(x, y, before, rows, channels, row_stride, channel_stride, BLOCK: tl.constexpr):  # noqa: N803 - a constant of the compiler
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    sums = tl.zeros((BLOCK,), tl.float32)
    column = x + channel.to(tl.int64) * channel_stride
    for step in range(rows):
        row = tl.cast(step, tl.int64)
        here = tl.load(column + row * row_stride, mask=exists, other=0.0)
        sums = sums * 0.5 + here.to(tl.float32)
        tl.store(before + row * channels + channel, sums, mask=exists)
    tl.debug_barrier()  # other threads may read what these have stored
    sums = tl.zeros((BLOCK,), tl.float32)
    for step in range(rows):
        row = tl.cast(rows - 1 - step, tl.int64)
        here = tl.load(column + row * row_stride, mask=exists, other=0.0)
        sums = sums * 0.5 + here.to(tl.float32)
        total = tl.load(before + row * channels + channel, mask=exists, other=0.0) + sums
        tl.store(y + row * channels + channel, total.to(y.dtype.element_ty), mask=exists)
