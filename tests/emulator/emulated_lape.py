"""What the tests of the emulated kernels of lape_add and lape_scatter share."""

from __future__ import annotations

import math
import re

import torch

from tests.emulator.backend import NAMESPACE

NAN, INF = math.nan, math.inf
TABLES = ("temporal", "height", "width")


def raw():
    return getattr(torch.ops, NAMESPACE)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape))).to(dtype)


def random_tables(anchors, channels: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    return [random(n, channels, seed=seed + i, dtype=dtype) for i, n in enumerate(anchors)]


def elements(names, kernel: str) -> set[int]:
    """How many channels a thread takes, of each instantiation of a kernel among them."""
    found = [re.search(rf"\b{kernel}<.*Packets<[\w:]+, (\d+)>", name) for name in names]
    return {int(match[1]) for match in found if match}


def in_nan(x: torch.Tensor, at: int, spare: int) -> torch.Tensor:
    """`x` as a view into a larger tensor of NaN, `at` places from its origin in every dimension."""
    memory = torch.full([size + at + spare for size in x.shape], NAN, dtype=x.dtype)
    view = memory[tuple(slice(at, at + size) for size in x.shape)]
    return view.copy_(x)


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]
