"""The Triton kernels of normalized_region_attention and its backward against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

import llava_st_ops
from llava_st_ops import reference
from tests.triton.comparing import (
    DTYPES,
    F16,
    F32,
    assert_all_close,
    assert_same_bits,
    ignores_numpy_warnings,
    needs_gpu,
    random_like,
    run_in_a_graph,
)

NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")
pytestmark = ignores_numpy_warnings


@pytest.fixture
def kernels(launchers):
    return launchers("normalized_region_attention")


def inputs(grid, region, heads, channels, dtype, device, batch=1):
    """Gradient of the output, query, key and value. Scores are of about unit size, as trained ones."""
    regions = [-(-size // step) for size, step in zip(grid, region, strict=True)]
    queries = (batch, *regions, heads, channels)
    g, query = (random_like(queries, F32, device, seed) for seed in (1, 2))
    key, value = (random_like((batch, *grid, channels), F32, device, seed) for seed in (3, 4))
    return [x.to(dtype) for x in (g, query * channels**-0.5, key * 2 + 0.5, value * 3 - 1)]


def run(module, tensors, region, eps=1e-5):
    g, *rest = tensors
    return (
        module.normalized_region_attention(*rest, region, eps),
        *module.normalized_region_attention_backward(g, *rest, region, eps),
    )


def check(kernels, tensors, region, eps=1e-5):
    actual = run(kernels, tensors, region, eps)
    exact = run(reference, [x.double() for x in tensors], region, eps)
    assert_all_close(actual, exact, run(reference, tensors, region, eps), NAMES)
    return actual


REGIONS = [
    # grid, region: 9 keys, 5, 17, partial at all edges, one key, more than the grid, more than 16 and 32
    ((1, 3, 6), (1, 3, 3)),
    ((7, 1, 2), (5, 1, 1)),
    ((1, 1, 20), (1, 1, 17)),
    ((3, 4, 2), (2, 3, 2)),
    ((1, 2, 2), (1, 1, 1)),
    ((2, 3, 4), (10**12, 10**12, 10**12)),
    ((6, 4, 3), (5, 3, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "region"), REGIONS, ids=str)
def test_regions(kernels, device, grid, region, dtype):
    check(kernels, inputs(grid, region, 3, 20, dtype, device), region)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 8, 17, 64])
def test_heads(kernels, device, heads, dtype):
    check(kernels, inputs((1, 3, 4), (1, 3, 3), heads, 32, dtype, device), (1, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 16, 40, 129, 288])
def test_channels(kernels, device, channels, dtype):
    """Rows that are no whole vectors, and some of several blocks."""
    check(kernels, inputs((1, 3, 4), (1, 3, 3), 5, channels, dtype, device), (1, 3, 3))


LARGE = [
    # grid, region, heads, channels: two chunks of keys, partial regions, three blocks of channels
    ((1, 9, 9), (1, 9, 9), 3, 24),
    ((3, 6, 9), (2, 6, 7), 2, 20),
    ((1, 9, 10), (1, 9, 10), 17, 40),
    ((1, 1, 3), (1, 1, 3), 130, 9),  # few keys, many heads
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_regions_and_many_heads(kernels, device, case, dtype):
    grid, region, heads, channels = case
    assert kernels._blocks(math.prod(region), heads, channels, dtype) is None
    check(kernels, inputs(grid, region, heads, channels, dtype, device), region)


@pytest.fixture(params=["small", "large"])
def either(request, kernels, monkeypatch):
    """Both ways for regions that fit a program, the second in chunks of 16 keys and heads."""
    if request.param == "large":
        monkeypatch.setattr(kernels, "_MAX_KEYS", 0)
        monkeypatch.setattr(kernels, "_CHUNK_KEYS", 16)
    return kernels


@pytest.mark.parametrize("view", ["permuted", "last dimension", "unaligned", "expanded"])
def test_strides(either, device, view):
    region = (1, 2, 2)
    g, query, key, value = inputs((1, 2, 3), region, 3, 16, F16, device, batch=2)

    def permuted(x):
        dims = tuple(reversed(range(x.dim())))
        return x.permute(dims).contiguous().permute(dims)

    views = {
        "permuted": permuted,
        "last dimension": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
        "unaligned": lambda x: torch.cat((x.flatten(), x.flatten()[:1]))[1:].view(x.shape),
        "expanded": lambda x: x[:1, :, :1].expand_as(x),
    }
    check(either, [views[view](x) for x in (g, query, key, value)], region)


def test_gradient_expanded_from_one_number(either, device):
    region = (1, 3, 3)
    g, *rest = inputs((1, 3, 4), region, 3, 16, F32, device)
    check(either, [torch.ones((), device=device).expand_as(g), *rest], region)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_far_from_zero(either, device, dtype):
    """And rows of very different variance: what multiplies them spans more than fp16 does."""
    region = (1, 3, 3)
    g, query, key, value = inputs((1, 3, 4), region, 3, 40, F32, device)
    far = torch.arange(12, device=device).view(1, 1, 3, 4, 1)
    key = key * 1.6 ** (far - 6) + (far - 5) * 20
    value = value * 2.0 ** (far - 6) - (far - 7) * 10
    check(either, [x.to(dtype) for x in (g, query + 0.5, key, value)], region)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nothing_is_rounded_but_the_results(either, device, dtype):
    """To 16 bits; the weights above all, which products of 16 bits take in two parts."""
    region = (1, 3, 3)
    tensors = inputs((1, 3, 3), region, 8, 48, dtype, device)
    slack = {F16: 1e-5}.get(dtype, 1e-4)
    for actual, exact, name in zip(
        run(either, tensors, region), run(reference, [x.double() for x in tensors], region), NAMES, strict=True
    ):
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + slack * exact.abs().max()
        assert ((actual.double() - exact).abs() <= bound).all(), name


def test_small_weights_in_fp16(either, device):
    """Far below the smallest number of fp16 their sums are still right: the gradients are those of a scaled loss."""
    region = (1, 3, 3)
    g, query, key, value = inputs((1, 3, 3), region, 3, 40, F16, device)
    key = (key.float() * 1000).half()
    g, value = (g.float() * 1000).half(), (value.float() * 2000).half()
    check(either, (g, query, key, value), region)


def test_scores_too_large_for_an_exponential(either, device):
    """Which have errors of several units in their last place, and so the weights relative to each other."""
    region = (1, 3, 3)
    g, query, key, value = inputs((1, 3, 4), region, 2, 16, F32, device)
    tensors = (g, query * 200, key, value)
    for actual, exact in zip(
        run(either, tensors, region), run(reference, [x.double() for x in tensors], region), strict=True
    ):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("eps", [0.0, 0.3, 1])
def test_eps(either, device, eps):
    check(either, inputs((1, 3, 4), (1, 3, 3), 2, 16, F32, device), (1, 3, 3), eps)


def test_constant_rows(either, device):
    """Have no direction: zeros, divided by the root of eps."""
    tensors = inputs((1, 3, 4), (1, 3, 3), 2, 16, F32, device)
    for x in tensors[2:]:
        x[0, 0, 1] = 0
        x[0, 0, :, 2] = 4
    check(either, tensors, (1, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_spread_as_in_the_reference(either, device, dtype):
    region = (1, 3, 3)
    g, query, key, value = inputs((6, 3, 2), region, 2, 8, dtype, device)
    key[0, 0, 1, 1, 3] = math.nan
    value[0, 1, 2, 1, 3] = math.nan
    key[0, 2, 1, 1, 0] = math.inf
    value[0, 3, 1, 0, 0] = -math.inf
    query[0, 4, 0, 0, 1, 5] = math.nan
    g[0, 5, 0, 0, 0, 2] = math.nan
    check(either, (g, query, key, value), region)


@pytest.mark.parametrize(
    ("batch", "grid", "heads"), [(0, (2, 3, 3), 2), (1, (0, 3, 3), 2), (1, (2, 3, 0), 2), (1, (2, 3, 4), 0)], ids=str
)
def test_empty(either, device, batch, grid, heads):
    check(either, inputs(grid, (1, 3, 3), heads, 8, F32, device, batch=batch), (1, 3, 3))


def test_counting_in_64_bits(either, device, monkeypatch):
    """What happens from 2**29 programs on, with a grid along two axes that is rounded up."""
    monkeypatch.setattr(either, "_WIDE_FROM", 0)
    monkeypatch.setattr(either, "_MAX_PROGRAMS", 2)
    monkeypatch.setattr(either, "_MAX_CHANNELS", 16)
    check(either, inputs((3, 3, 3), (1, 3, 3), 3, 24, F16, device), (1, 3, 3))


def test_repeats_bit_by_bit(either, device):
    tensors = inputs((1, 3, 4), (1, 3, 3), 3, 24, F16, device)
    assert_same_bits(*(run(either, tensors, (1, 3, 3)) for _ in range(2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd(kernels, device, dtype):
    region = (1, 3, 3)
    g, *rest = inputs((1, 3, 4), region, 3, 24, dtype, device)
    leaves = [x.requires_grad_() for x in rest]
    with llava_st_ops.use_backend("triton"):
        output = llava_st_ops.normalized_region_attention(*leaves, region)
    grads = torch.autograd.grad(output, leaves, g)
    detached = [g, *(x.detach() for x in rest)]
    assert_same_bits((output.detach(), *grads), run(kernels, detached, region))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (5, 1, 1), (5, 3, 3), (10, 27, 27)], ids=str)
def test_paper_shape(kernels, device, region, dtype):
    check(kernels, inputs((10, 27, 27), region, 8, 1024, dtype, device), region)


@needs_gpu
def test_calls_can_be_captured(either, device):
    tensors = inputs((2, 3, 4), (1, 3, 3), 3, 24, F16, device)
    assert_same_bits(run_in_a_graph(lambda: run(either, tensors, (1, 3, 3))), run(either, tensors, (1, 3, 3)))
