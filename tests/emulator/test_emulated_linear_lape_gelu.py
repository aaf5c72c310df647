"""What is special about the CUDA kernels of linear_lape_gelu: layouts, runs of patches, strides, special numbers.

They run in the emulator, as raw ops. Matrix products are torch's there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from llava_st_ops import reference
from tests.emulator.backend import DTYPES, emulated, launched
from tests.emulator.emulated_lape import INF, NAN, elements, in_nan, random, random_tables, raw, wide
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned_results", "ops")

FORWARD, BACKWARD = "position_gelu", "gelu_gradient"


@dataclass(frozen=True)
class Case:
    """A call: samples, grid, numbers that go into the layer and that come out."""

    samples: int
    grid: tuple[int, int, int]
    inputs: int
    channels: int

    def arguments(self, dtype: torch.dtype, tables: torch.dtype | None = None) -> list[torch.Tensor]:
        features = random(self.samples, *self.grid, self.inputs, seed=1, dtype=dtype)
        weight = random(self.channels, self.inputs, seed=2, dtype=dtype) / math.sqrt(max(self.inputs, 1))
        bias = random(self.channels, seed=3, dtype=tables or dtype)
        return [features, weight.to(dtype), bias, *random_tables(self.grid, self.channels, tables or dtype)]


def check_forward(arguments, keep: bool) -> None:
    activation, preactivation = raw().linear_lape_gelu(*arguments, keep)
    exact = reference.linear_lape_gelu(*wide(*arguments), keep)
    same = reference.linear_lape_gelu(*arguments, keep)
    assert activation.is_contiguous()
    assert_accurate(activation, exact[0], same[0], "activation")
    if keep:
        assert preactivation.is_contiguous()
        assert_accurate(preactivation, exact[1], same[1], "preactivation")
    else:
        assert preactivation.shape == (0,)


def check_backward(grad_output, weight, preactivation) -> None:
    results = raw().gelu_linear_gradient(grad_output, weight, preactivation)
    exact = reference.gelu_linear_gradient(*wide(grad_output, weight, preactivation))
    same = reference.gelu_linear_gradient(grad_output, weight, preactivation)
    for name, *each in zip(("gradient", "activation"), results, exact, same, strict=True):
        assert each[0].is_contiguous()
        assert_accurate(*each, name)


def check(case: Case, dtype: torch.dtype, tables: torch.dtype | None = None) -> None:
    arguments = case.arguments(dtype, tables)
    for keep in (False, True):
        check_forward(arguments, keep)
    tokens = case.samples * math.prod(case.grid)
    factors = random(tokens, 6, seed=5, dtype=dtype), random(6, case.channels, dtype=dtype)
    check_backward(*factors, random(tokens, case.channels, dtype=dtype))


# Rows of more patches than are in flight, of fewer, and of one; channels in packets and not.
CASES = [
    Case(1, (2, 3, 5), 8, 16),
    Case(2, (3, 2, 9), 5, 8),
    Case(3, (1, 3, 1), 16, 24),
    Case(1, (5, 1, 4), 8, 3),
    Case(2, (2, 2, 2), 3, 12),
    Case(1, (1, 1, 1), 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(case, dtype):
    with launched() as names:
        check(case, dtype)
    vector = 16 // dtype.itemsize
    wanted = {vector if case.channels % vector == 0 else 1}
    assert elements(names, FORWARD) == wanted
    assert elements(names, BACKWARD) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", DTYPES, ids=str)
def test_tables_of_another_dtype(dtype, tables):
    check(CASES[0], dtype, tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_runs_and_fewer_blocks_than_work(dtype):
    """Where there are threads enough, as is soon the case with a single block, each takes more patches."""
    with emulated(max_blocks=1):
        check(Case(2, (2, 9, 19), 3, 64), dtype)
        check(CASES[1], dtype)


def test_features_with_strides():
    """Cut out of a wider matrix, one for all samples, and with channels apart: as matrix products take them, or not."""
    features, *others = Case(2, (3, 2, 5), 8, 8).arguments(torch.bfloat16)
    for view in (
        in_nan(features, 0, 8),
        in_nan(features, 1, 0),
        features[:1].expand(features.shape),
        features.permute(4, 1, 0, 3, 2).contiguous().permute(2, 1, 4, 3, 0),
        torch.stack([features, torch.full_like(features, NAN)], -1)[..., 0],
    ):
        check_forward([view, *others], True)


def test_tables_and_weights_with_strides():
    """Unaligned tables do not matter: they are copied."""
    features, *others = Case(1, (2, 3, 5), 8, 8).arguments(torch.float32)
    shifted = torch.cat([torch.full((1,), NAN), others[0].flatten()])[1:].view(others[0].shape)
    apart = torch.cat([torch.full((1,), NAN), others[2].flatten()])[1:].view(others[2].shape)
    assert apart.is_contiguous()
    assert apart.data_ptr() % 16
    with launched() as names:
        check_forward([features, *(in_nan(x, 1, 2) for x in others)], True)
        check_forward([features, shifted, others[1], apart, *others[3:]], False)
        check_forward([features, others[0].t().contiguous().t(), *others[1:]], False)
    assert elements(names, FORWARD) == {4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_preactivations_with_strides(dtype):
    """A slice of columns, as that of one among several MLPs, with rows and pointers aligned or not."""
    vector = 16 // dtype.itemsize
    both = random(7, 4 * vector, dtype=dtype)
    grad, weight = random(7, 3, dtype=dtype), random(3, 2 * vector, dtype=dtype)
    odd = in_nan(both, 0, 1)
    for view, packets in (
        (both[:, 2 * vector :], vector),
        (both[:, 1 : 1 + 2 * vector], 1),
        (odd[:, 2 * vector :], 1),
        (odd[:1, 2 * vector :], None),  # a single row has no stride
        (both[:, ::2], vector),
        (both[:1, : 2 * vector].expand(7, -1), vector),
    ):
        with launched() as names:
            check_backward(grad[: len(view)], weight, view)
        aligned = vector if view.data_ptr() % 16 == 0 else 1
        assert elements(names, BACKWARD) == {packets or aligned}


def test_factors_of_the_gradient_with_strides():
    grad, weight, x = random(6, 4), random(4, 8), random(6, 8)
    check_backward(in_nan(grad, 1, 2), in_nan(weight, 1, 2), x)
    check_backward(grad[:1].expand(6, 4), weight.t().contiguous().t(), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_special_numbers(dtype):
    """Where the GELU is zero or the identity, in its tails, at zero, and at what is no number."""
    x = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 6e4, -6e4, INF, -INF, NAN, 0.5])
    x = x.to(dtype).repeat(3, 1)
    check_backward(random(3, 4, dtype=dtype), random(4, 16, dtype=dtype), x)
    zeros = [torch.zeros(n, 16, dtype=dtype) for n in (1, 1, 3)]
    features = torch.zeros(1, 1, 1, 3, 2, dtype=dtype)
    for keep in (False, True):
        check_forward([features, torch.zeros(16, 2, dtype=dtype), x[0], *zeros], keep)


def test_a_row_of_nan_stays_alone():
    features, *others = Case(1, (2, 3, 5), 8, 8).arguments(torch.bfloat16)
    features[0, 1, 2, 3] = NAN
    activation, preactivation = raw().linear_lape_gelu(features, *others, True)
    for result in (activation, preactivation):
        assert result[0, 1, 2, 3].isnan().all()
        assert result.isnan().sum() == 8


def test_the_tails_are_as_exact_as_float():
    """Against erfc in float64: what is small and negative is no difference of large numbers' roundings."""
    x = torch.linspace(-12, 12, 4096).view(1, -1)
    gradient, activation = raw().gelu_linear_gradient(torch.ones(1, 1), torch.ones(1, 4096), x)
    below = torch.special.erfc(x.double() * -math.sqrt(0.5)) / 2
    density = torch.exp(x.double().square() / -2) / math.sqrt(2 * math.pi)
    step = torch.finfo(torch.float32).eps
    assert (activation - x * below).abs().max() < 12 * step
    assert (gradient - (below + x * density)).abs().max() < 4 * step


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (Case(0, (2, 3, 4), 8, 8), (0, 3, 8)),
        (Case(2, (2, 3, 4), 0, 8), (5, 0, 8)),
        (Case(2, (2, 3, 4), 8, 0), (5, 3, 0)),
    ],
    ids=["tokens", "what goes in", "channels"],
)
def test_nothing(case, sizes):
    arguments = case.arguments(torch.bfloat16)
    for keep in (False, True):
        check_forward(arguments, keep)
    tokens, numbers, channels = sizes
    check_backward(random(tokens, numbers), random(numbers, channels), random(tokens, channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(dtype):
    arguments = CASES[1].arguments(dtype)
    results = []
    for seed in range(4):
        with emulated(seed=seed):
            activation, preactivation = raw().linear_lape_gelu(*arguments, True)
            x = preactivation.flatten(0, 3)
            results.append([activation, preactivation, *raw().gelu_linear_gradient(x, random(8, 8, dtype=dtype), x)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_keeping_changes_nothing():
    arguments = CASES[0].arguments(torch.bfloat16)
    assert torch.equal(raw().linear_lape_gelu(*arguments, True)[0], raw().linear_lape_gelu(*arguments, False)[0])
