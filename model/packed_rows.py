"""Rows that hold several samples, and rows with padding."""

from __future__ import annotations

import torch
from torch import Tensor


def places_in_samples(sample: Tensor) -> Tensor:
    """Position ids that start again with each sample of a packed row."""
    places = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
    starts = torch.ones_like(sample, dtype=torch.bool)
    starts[:, 1:] = sample[:, 1:] != sample[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values


def padding_follows(attention_mask: Tensor) -> bool:
    """Whether there is no padding but behind samples, where causal attention does not look. A GPU is waited for."""
    return attention_mask.dim() == 2 and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def without_first_tokens(labels: Tensor, attention_mask: Tensor | None, sample: Tensor | None) -> Tensor:
    """Labels without those of first tokens, which neither padding nor the end of another sample predicts."""
    first = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
    if attention_mask is not None and attention_mask.dim() == 2:
        first |= attention_mask[:, :-1] == 0
    if sample is not None:
        first |= sample[:, 1:] != sample[:, :-1]
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(first, -100)], 1)
