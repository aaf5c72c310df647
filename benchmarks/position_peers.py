"""Other ways to compute LAPE's addition, the input embeddings and the coordinate loss: as published, and by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_st_ops.reference.coordinate_loss import targets_of
from llava_st_ops.reference.lape import anchors_around


def resized(table: Tensor, size: int, align_corners: bool) -> Tensor:
    """`[n, C]` -> `[size, C]` by torch's interpolation along the anchors."""
    return torch.nn.functional.interpolate(table.T[None], size, mode="linear", align_corners=align_corners)[0].T


def eager_add(features: Tensor, temporal: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """As published: resized tables, then one addition after the other."""
    _, frames, rows, columns, _ = features.shape
    features = features + resized(height, rows, False)[:, None]
    features = features + resized(width, columns, False)
    return features + resized(temporal, frames, True)[:, None, None]


def eager_add_in_place(features: Tensor, temporal: Tensor, height: Tensor, width: Tensor) -> Tensor:
    _, frames, rows, columns, _ = features.shape
    features += resized(height, rows, False)[:, None]
    features += resized(width, columns, False)
    features += resized(temporal, frames, True)[:, None, None]
    return features


def eager_scatter(
    embed: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    visual: Tensor,
    input_ids: Tensor,
    axis: Tensor,
    positions: Tensor,
    visual_index: Tensor,
) -> Tensor:
    """Vectorised, without a loop over samples or tokens, which the published code has: rows of words, then those of
    visual tokens, then those of each axis over them."""
    tables = (temporal, height, width)
    is_visual = visual_index >= 0
    is_text = ~is_visual & (axis < 0)
    output = torch.nn.functional.embedding(input_ids.where(is_text, 0), torch.cat([embed, *tables]))
    output[is_visual] = visual[visual_index[is_visual]]
    for number, table in enumerate(tables):
        here = ~is_visual & (axis == number)
        low, high, ratio = anchors_around(positions[here], len(table))
        share = ratio.to(table.dtype).unsqueeze(1)
        output[here] = torch.lerp(table[low], table[high], share)
    return output


class _ChunkedSum(torch.autograd.Function):
    """The sum of all losses, with the gradients of a chunk of tokens computed as soon as its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, classes: Tensor, targets: tuple[Tensor, ...], chunk: int) -> Tensor:
        grad_hidden, grad_classes = torch.empty_like(hidden), torch.zeros_like(classes)
        total = hidden.new_zeros(())
        for first in range(0, len(hidden), chunk):
            here = slice(first, first + chunk)
            rows, (low, high, ratio) = hidden[here], (target[here] for target in targets)
            token, ratio = torch.arange(len(rows), device=rows.device), ratio.to(rows.dtype)
            logits = rows @ classes.T
            logsumexp = logits.logsumexp(1)
            total += (logsumexp - (1 - ratio) * logits[token, low] - ratio * logits[token, high]).sum()
            grad = logits.sub_(logsumexp[:, None]).exp_()
            grad[token, low] -= 1 - ratio
            grad[token, high] -= ratio
            grad_hidden[here] = grad @ classes
            grad_classes.addmm_(grad.T, rows)
        ctx.save_for_backward(grad_hidden, grad_classes)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_classes = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_classes.mul_(grad), None, None


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    labels: Tensor,
    axis: Tensor,
    positions: Tensor,
    chunk: int,
) -> Tensor:
    """The mean over tokens, all of them active, in plain PyTorch: chunks of tokens, so that only their logits exist."""
    tables = (temporal, height, width)
    targets = targets_of(labels, axis, positions, len(weight), tables)
    return _ChunkedSum.apply(hidden, torch.cat([weight, *tables]), targets, chunk) / len(labels)
