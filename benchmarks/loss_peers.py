"""Fused linear cross entropies of others: Liger-Kernel and cut-cross-entropy, where they are installed and can run.

They know ordinary labels only: one class per token, of one table. A position at an anchor is such a label, one between
two anchors is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

HardLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss(hidden, classes, labels)` of `[N, C]`, `[K, C]` and `[N]`: the mean over tokens."""


def _liger() -> HardLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _cut_cross_entropy(**settings: str | None) -> HardLoss:
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, **settings)


# Of each: how to get it, and whether Triton kernels compute it. Triton's interpreter would run these on a CPU, at a
# speed that says nothing.
_LOSSES: dict[str, tuple[Callable[[], HardLoss], bool]] = {
    "Liger-Kernel": (_liger, True),
    "cut-cross-entropy, gradient filtering": (functools.partial(_cut_cross_entropy, filter_eps="high"), True),
    "cut-cross-entropy, no gradient filtering": (functools.partial(_cut_cross_entropy, filter_eps=None), True),
    "cut-cross-entropy, torch.compile": (functools.partial(_cut_cross_entropy, impl="torch_compile"), False),
}


def fused_losses(device: torch.device) -> dict[str, HardLoss | str]:
    """Each by name, or the reason why it cannot be measured on this device."""
    found: dict[str, HardLoss | str] = {}
    for name, (load, of_triton) in _LOSSES.items():
        if of_triton and device.type != "cuda":
            found[name] = "its kernels are written in Triton and need a GPU"
            continue
        try:
            found[name] = load()
        except ImportError as error:
            found[name] = str(error)
    return found
