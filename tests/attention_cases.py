"""Inputs of point-to-region attention for tests, and results to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_st_ops import reference
from tests.tolerance import assert_accurate


@dataclass(frozen=True)
class Case:
    """A dense problem: keys `[batch, *grid, heads, dim]`."""

    batch: int
    grid: tuple[int, int, int]
    region: tuple[int, int, int]
    heads: int
    dim: int

    def __str__(self) -> str:
        grid, region = ("x".join(map(str, sizes)) for sizes in (self.grid, self.region))
        return f"{self.batch}x{grid}-by-{region}-heads{self.heads}-dim{self.dim}"

    @property
    def query_shape(self) -> tuple[int, ...]:
        regions = (-(-size // step) for size, step in zip(self.grid, self.region, strict=True))
        return (self.batch, *regions, self.heads, self.dim)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.grid, self.heads, self.dim)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
        """Fresh random query, key and value."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (self.query_shape, self.key_shape, self.key_shape)
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


CASES = [
    Case(2, (2, 6, 9), (1, 3, 3), 2, 128),  # the spatial stream
    Case(1, (10, 3, 3), (5, 1, 1), 3, 64),  # the temporal stream
    Case(1, (5, 6, 6), (5, 3, 3), 2, 32),  # joint: 45 keys
    Case(2, (3, 7, 5), (2, 3, 3), 3, 40),  # partial at every edge
    Case(1, (3, 4, 5), (2, 2, 2), 1, 7),  # rows that are no whole vectors
    Case(1, (4, 3, 2), (1, 1, 1), 2, 16),  # one key per region
    Case(1, (3, 5, 6), (9, 9, 9), 4, 24),  # the whole grid, as a larger region
    Case(3, (1, 1, 1), (1, 3, 3), 1, 1),  # one of everything
    Case(1, (2, 3, 4), (2, 3, 2), 5, 256),  # the widest head
]
EMPTY_CASES = [
    Case(0, (2, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (0, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (2, 3, 3), (1, 3, 3), 0, 8),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 0),
]


def gradients(function, inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of `function(*inputs)` and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return output.detach(), list(torch.autograd.grad(output, leaves, grad_output))


def assert_matches_reference(function, plain, inputs: Sequence[Tensor], seed: int = 1) -> None:
    """Output and gradients of `function(query, key, value)` against `plain` in float64 and in the dtype itself."""
    generator = torch.Generator().manual_seed(seed)
    query = inputs[0]
    grad_output = torch.randn(query.shape, generator=generator).to(query.device, query.dtype)
    output, grads = gradients(function, inputs, grad_output)
    exact, exact_grads = gradients(plain, [x.double() for x in inputs], grad_output.double())
    same, same_grads = gradients(plain, inputs, grad_output)
    assert_accurate(output, exact, same, "output")
    for name, *triple in zip(("query", "key", "value"), grads, exact_grads, same_grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


def dense_reference(region: Sequence[int], scale: float | None = None):
    return lambda q, k, v: reference.point_to_region_attention(q, k, v, region, scale)


def packed_reference(grid_thw: Tensor, region: Sequence[int], scale: float | None = None):
    return lambda q, k, v: reference.point_to_region_attention_packed(q, k, v, grid_thw, region, scale)
