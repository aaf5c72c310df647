"""Inputs of point-to-region attention for tests, and results to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_st_ops import reference
from tests.tolerance import assert_accurate


@dataclass(frozen=True)
class Case:
    """A dense problem: keys `[batch, *grid, heads, dim]`, values `[.., value_dim]`, by default `[.., dim]`."""

    batch: int
    grid: tuple[int, int, int]
    region: tuple[int, int, int]
    heads: int
    dim: int
    value_dim: int | None = None
    biased: bool = False

    def __str__(self) -> str:
        grid, region = ("x".join(map(str, sizes)) for sizes in (self.grid, self.region))
        text = f"{self.batch}x{grid}-by-{region}-heads{self.heads}-dim{self.dim}"
        return text + (f"-values{self.value_dim}" if self.value_dim is not None else "") + "-biased" * self.biased

    @property
    def query_shape(self) -> tuple[int, ...]:
        regions = (-(-size // step) for size, step in zip(self.grid, self.region, strict=True))
        return (self.batch, *regions, self.heads, self.dim)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.grid, self.heads, self.dim)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (*self.key_shape[:-1], self.dim if self.value_dim is None else self.value_dim)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.query_shape[:-1], self.value_shape[-1])

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
        """Fresh random query, key and value; and a bias, where there is one."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (self.query_shape, self.key_shape, self.value_shape)
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        if self.biased:
            inputs.append(random_bias(self.key_shape[:-1], generator))
            inputs[-1][:, : self.region[0], : self.region[1], : self.region[2], :1] = -math.inf  # a whole region
        return [x.to(device, dtype) for x in inputs]


def random_bias(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random numbers; a quarter of the keys is masked."""
    bias = torch.randn(shape, generator=generator)
    return bias.masked_fill(torch.rand(shape, generator=generator) < 0.25, -math.inf)


CASES = [
    Case(2, (2, 6, 9), (1, 3, 3), 2, 128),  # the spatial stream
    Case(1, (10, 3, 3), (5, 1, 1), 3, 64),  # the temporal stream
    Case(1, (5, 6, 6), (5, 3, 3), 2, 32),  # joint: 45 keys
    Case(2, (3, 7, 5), (2, 3, 3), 3, 40),  # partial at every edge
    Case(1, (3, 4, 5), (2, 2, 2), 1, 7),  # rows that are no whole vectors
    Case(1, (4, 3, 2), (1, 1, 1), 2, 16),  # one key per region
    Case(1, (3, 5, 6), (9, 9, 9), 4, 24),  # the whole grid, as a larger region
    Case(3, (1, 1, 1), (1, 3, 3), 1, 1),  # one of everything
    Case(1, (2, 3, 4), (2, 3, 2), 5, 256),
    Case(2, (2, 6, 9), (1, 3, 3), 2, 128, biased=True),
    Case(2, (3, 7, 5), (2, 3, 3), 3, 40, biased=True),
    Case(1, (3, 4, 5), (2, 2, 2), 1, 7, 9, biased=True),
    Case(1, (5, 6, 6), (5, 3, 3), 2, 32, biased=True),  # many keys
    Case(1, (2, 5, 4), (1, 3, 3), 3, 24, 64),  # values wider than keys
    Case(1, (6, 3, 4), (6, 3, 3), 2, 128, 8),  # and less wide
    Case(1, (1, 4, 4), (1, 2, 2), 1, 1152),  # the widest head
    Case(1, (1, 3, 4), (1, 3, 3), 2, 1148, 520, biased=True),
    Case(1, (1, 3, 4), (1, 3, 3), 1, 16, 1151),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 0, 8, biased=True),  # scores are biases
]
EMPTY_CASES = [
    Case(0, (2, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (0, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (2, 3, 3), (1, 3, 3), 0, 8),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 0),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 8, 0),
    Case(0, (2, 3, 3), (1, 3, 3), 2, 8, biased=True),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 0, biased=True),
    Case(1, (2, 3, 3), (1, 3, 3), 2, 8, 0, biased=True),
]


def gradients(function, inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of `function(*inputs)` and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return output.detach(), list(torch.autograd.grad(output, leaves, grad_output))


def assert_matches_reference(function, plain, inputs: Sequence[Tensor], seed: int = 1) -> None:
    """Output and gradients of `function(query, key, value)`, or `(.., bias)`, against `plain` in float64 and in the
    dtype itself."""
    generator = torch.Generator().manual_seed(seed)
    query, _, value = inputs[:3]
    shape = (*query.shape[:-1], value.shape[-1])
    grad_output = torch.randn(shape, generator=generator).to(query.device, query.dtype)
    output, grads = gradients(function, inputs, grad_output)
    exact, exact_grads = gradients(plain, [x.double() for x in inputs], grad_output.double())
    same, same_grads = gradients(plain, inputs, grad_output)
    assert_accurate(output, exact, same, "output")
    names = ("query", "key", "value", "bias")[: len(inputs)]
    for name, *triple in zip(names, grads, exact_grads, same_grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


def dense_reference(region: Sequence[int], scale: float | None = None):
    return lambda q, k, v, bias=None: reference.point_to_region_attention(q, k, v, region, scale, bias)


def packed_reference(grid_thw: Tensor, region: Sequence[int], scale: float | None = None):
    return lambda q, k, v, bias=None: reference.point_to_region_attention_packed(q, k, v, grid_thw, region, scale, bias)
