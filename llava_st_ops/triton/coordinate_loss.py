"""coordinate_cross_entropy and its backward: matrix products of torch, and Triton kernels between them.

Logits never exist but in tiles, of a block of tokens and a block of classes; the backward pass computes them again.
Products accumulate in fp32, and give fp32. (Where the user has allowed TF32, products of fp32 matrices use it.)

The functions take tensors that were checked before (`llava_st_ops.ops`), with any strides, and return new contiguous
ones. What is launched depends on shapes, dtypes and strides alone, and nothing is read back from the device, so that
calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import launching
from .launching import next_power_of_2, on_device_of

if TYPE_CHECKING:
    from .coordinate_loss_kernels import Targets

# A tile has at most this many tokens, classes, and logits: 32 MiB. All that the backward pass holds at once, besides
# its inputs and results, is then below 128 MiB for the 2,700 tokens of 3,584 channels of a published sample.
_TOKENS = 4096
_CLASSES = 4096
_LOGITS = 8 * 2**20
# Rows of a tile start at whole vectors where their number of classes divides by this.
_CLASSES_STEP = 16
_UPDATE_BLOCK = 2048
_GRADIENTS_BLOCK = 1024
_LOSSES_BLOCK = 128
# Gradients of logits are scaled so that the largest is between half of this and this: in fp16 most of them would
# otherwise be rounded to nothing, one of 150,000 classes of one of 2,700 tokens being some 1e-9.
_LARGEST_GRADIENT = 2.0**14


def _token_blocks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, _TOKENS):
        yield slice(start, min(start + _TOKENS, tokens))


def _class_blocks(sources: Sequence[Tensor], tokens: int) -> Iterator[tuple[int, int, slice]]:
    """Blocks of the rows of each source, for tiles of up to `tokens` tokens: the number of the source, the class of the
    first row, and the rows."""
    size = max(1, min(_CLASSES, _LOGITS // min(tokens, _TOKENS)))
    size -= size % _CLASSES_STEP if size > _CLASSES_STEP else 0
    first = 0
    for number, source in enumerate(sources):
        for start in range(0, len(source), size):
            yield number, first + start, slice(start, min(start + size, len(source)))
        first += len(source)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, of two matrices of one dtype."""
    if a.is_cuda and a.dtype != torch.float32 and a.shape[1] and b.shape[1]:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _common_dtype(hidden: Tensor, source: Tensor) -> torch.dtype:
    """In which a product of the two has its inputs."""
    return hidden.dtype if source.dtype == hidden.dtype else torch.float32


def _targets(
    labels: Tensor, axis: Tensor, positions: Tensor, sources: Sequence[Tensor], ignore_index: int, block: slice
) -> Targets:
    from .coordinate_loss_kernels import Targets

    tensors = (labels[block], axis[block], positions[block])
    return Targets(*tensors, tuple(x.stride(0) for x in tensors), tuple(map(len, sources)), ignore_index)


def coordinate_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """hidden `[N, C]`, weight `[V, C]`, tables `[n, C]`, `[m, C]`, `[m', C]`, labels, axis and positions `[N]` -> the
    loss of each token and the logsumexp of its logits, fp32 `[N]`, both 0 where its label is `ignore_index`.

    A token with a label, an axis or a position that does not exist loses NaN: on the device there is nobody to tell.
    """
    from .coordinate_loss_kernels import losses_kernel, update_kernel

    tokens = len(hidden)
    sources = (weight, temporal, height, width)
    losses, logsumexp, low, high = (torch.empty((tokens,), dtype=torch.float32, device=hidden.device) for _ in range(4))
    maximum = torch.full_like(losses, float("-inf"))
    total = torch.zeros_like(losses)
    if tokens == 0:
        return losses, logsumexp
    with on_device_of(hidden):
        for number, first, rows in _class_blocks(sources, tokens):
            dtype = _common_dtype(hidden, sources[number])
            classes = sources[number][rows].to(dtype).t()
            for block in _token_blocks(tokens):
                logits = _product(hidden[block].to(dtype), classes)
                launching.launch(
                    update_kernel,
                    (len(logits),),
                    logits,
                    *(state[block] for state in (maximum, total, low, high)),
                    _targets(labels, axis, positions, sources, ignore_index, block),
                    first,
                    logits.shape[1],
                    BLOCK=min(next_power_of_2(logits.shape[1]), _UPDATE_BLOCK),
                    num_warps=8,
                )
        launching.launch(
            losses_kernel,
            (-(-tokens // _LOSSES_BLOCK),),
            maximum,
            total,
            low,
            high,
            losses,
            logsumexp,
            _targets(labels, axis, positions, sources, ignore_index, slice(None)),
            tokens,
            BLOCK=_LOSSES_BLOCK,
            num_warps=4,
        )
    return losses, logsumexp


def _scale_of(grad_losses: Tensor) -> Tensor:
    """The power of two, 0-dim, that is above the largest finite gradient and at most twice it. (`torch.ldexp` would
    leave it to `pow` whether it is one.)"""
    largest = grad_losses.where(grad_losses.isfinite(), 0).abs().amax().clamp(min=2.0**-100)
    return largest / torch.frexp(largest).mantissa


def coordinate_cross_entropy_backward(
    grad_losses: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    ignore_index: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and the three tables, of their shapes and dtypes; `[0]` where not wanted.

    Each is accumulated in fp32 and rounded once; what meets in a product is gradients of logits in the dtype of hidden.
    What tokens that do not count hold, if only NaN, takes no part.
    """
    from .coordinate_loss_kernels import gradients_kernel

    tokens, channels = hidden.shape
    sources = (weight, temporal, height, width)
    wanted = (grad_weight, grad_tables, grad_tables, grad_tables)
    gradients = tuple(
        torch.empty(source.shape if want else (0,), dtype=source.dtype, device=source.device)
        for source, want in zip(sources, wanted, strict=True)
    )
    hidden_sum = torch.zeros((tokens, channels) if grad_hidden else (0,), dtype=torch.float32, device=hidden.device)
    if tokens == 0:
        return hidden_sum.to(hidden.dtype), *(gradient.zero_() for gradient in gradients)
    with on_device_of(hidden):
        ignored = labels == ignore_index
        scale = _scale_of(grad_losses.masked_fill(ignored, 0)) / _LARGEST_GRADIENT
        grad_losses = grad_losses / scale
        logsumexp = logsumexp.contiguous()
        hidden = hidden.masked_fill(ignored[:, None], 0)
        for number, first, rows in _class_blocks(sources, tokens):
            if not (grad_hidden or wanted[number]):
                continue
            dtype = _common_dtype(hidden, sources[number])
            classes = sources[number][rows].to(dtype)
            classes_sum = None
            for block in _token_blocks(tokens):
                hidden_block = hidden[block].to(dtype)
                logits = _product(hidden_block, classes.t())
                grad_logits = torch.empty(logits.shape, dtype=dtype, device=logits.device)
                size = min(next_power_of_2(logits.shape[1]), _GRADIENTS_BLOCK)
                launching.launch(
                    gradients_kernel,
                    (-(-logits.shape[1] // size), len(logits)),
                    logits,
                    logsumexp[block],
                    grad_losses[block],
                    grad_logits,
                    _targets(labels, axis, positions, sources, ignore_index, block),
                    first,
                    logits.shape[1],
                    BLOCK=size,
                    num_warps=4,
                )
                del logits  # what follows needs the memory
                if grad_hidden:
                    hidden_sum[block] += _product(grad_logits, classes)
                if wanted[number]:
                    of_block = _product(grad_logits.t(), hidden_block)
                    classes_sum = of_block if classes_sum is None else classes_sum.add_(of_block)
                    del of_block
            if wanted[number]:
                gradients[number][rows] = classes_sum.mul_(scale)
        if grad_hidden:
            hidden_sum = hidden_sum.mul_(scale).masked_fill_(ignored[:, None], 0)
    return hidden_sum.to(hidden.dtype), *gradients
