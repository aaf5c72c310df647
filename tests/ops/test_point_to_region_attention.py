"""Results of point_to_region_attention and its gradients, on every backend, dtype and layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_st_ops import backends, point_to_region_attention, reference, use_backend
from tests.attention_cases import (
    CASES,
    EMPTY_CASES,
    Case,
    assert_matches_reference,
    dense_reference,
    gradients,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned_results")


def check(case: Case, inputs, scale=None):
    assert_matches_reference(
        lambda q, k, v, bias=None: point_to_region_attention(q, k, v, case.region, scale, bias),
        dense_reference(case.region, scale),
        inputs,
    )


def naive(query, key, value, region, scale, bias=None):
    """One query at a time, by the definition: an oracle that shares nothing with the reference."""
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for b, t, h, w, head in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:5])).tolist():
        block = [slice(i * step, (i + 1) * step) for i, step in zip((t, h, w), region, strict=True)]
        keys = key[b][tuple(block)][..., head, :].flatten(0, 2)
        values = value[b][tuple(block)][..., head, :].flatten(0, 2)
        scores = keys @ query[b, t, h, w, head] * scale
        if bias is not None:
            biases = bias[b][tuple(block)][..., head].flatten()
            there = biases > -math.inf
            scores, values = (scores + biases)[there], values[there]
        output[b, t, h, w, head] = torch.softmax(scores, 0) @ values
    return output


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    query, key, value, *bias = case.inputs(torch.float64)
    expected = naive(query, key, value, case.region, 0.3, *bias)
    actual = reference.point_to_region_attention(query, key, value, case.region, 0.3, *bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backward_is_the_derivative(case):
    inputs = case.inputs(torch.float64)
    grad_output = torch.randn(case.output_shape, dtype=torch.float64)
    _, expected = gradients(dense_reference(case.region), inputs, grad_output)
    query, key, value, *bias = inputs
    actual = reference.point_to_region_attention_backward(grad_output, query, key, value, case.region, None, *bias)
    torch.testing.assert_close(list(actual)[: len(inputs)], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(on_backend, case, dtype):
    verdict = backends.can_run(backends.forced_backend(), "point_to_region_attention", on_backend, dtype)
    if not verdict.ok:
        pytest.skip(verdict.reason)
    check(case, case.inputs(dtype, on_backend))


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty(on_backend, case):
    inputs = case.inputs(torch.float32, on_backend)
    output, grads = gradients(
        lambda q, k, v, bias=None: point_to_region_attention(q, k, v, case.region, None, bias),
        inputs,
        torch.empty(case.output_shape, device=on_backend),
    )
    assert output.shape == case.output_shape
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not any(grad.any() for grad in grads), "a sum over nothing"


def test_scale(on_backend):
    case = CASES[3]
    check(case, case.inputs(torch.float32, on_backend), scale=-0.7)


# The same draws in every run: on a handful of entries the reference can be exact by chance, and the bound too tight.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    sizes = st.integers(1, 5)
    case = Case(
        data.draw(st.integers(0, 2), "batch"),
        data.draw(st.tuples(sizes, sizes, sizes), "grid"),
        data.draw(st.tuples(sizes, sizes, sizes), "region"),
        data.draw(st.integers(1, 4), "heads"),
        data.draw(st.sampled_from([1, 2, 5, 8, 12, 33, 64]), "dim"),
        data.draw(st.sampled_from([None, 3, 16, 40]), "value_dim"),
        data.draw(st.booleans(), "biased"),
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    inputs = []
    for tensor in case.inputs(dtype, seed=data.draw(st.integers(0, 9), "seed")):
        layout = data.draw(st.sampled_from(["contiguous", "permuted", "sliced", "spread", "expanded"]), "layout")
        inputs.append(strided(tensor, layout))
    check(case, inputs)


def strided(tensor, layout):
    """The same shape, and but for "expanded" the same values, in memory of another layout."""
    if layout == "permuted":  # the last dimension is not contiguous
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced":  # rows of a larger tensor, unaligned
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
        wide[..., 1 : 1 + tensor.shape[-1]] = tensor
        return wide[..., 1 : 1 + tensor.shape[-1]]
    if layout == "spread":  # every other token of every axis
        spread = tensor
        for dim in range(5):
            spread = spread.repeat_interleave(2, dim)
        return spread[::2, ::2, ::2, ::2, ::2]
    if layout == "expanded" and tensor.numel():
        return tensor[:, :1].expand_as(tensor)
    return tensor


@pytest.mark.parametrize("layout", ["permuted", "sliced", "spread", "expanded"])
def test_strided(on_backend, layout):
    case = Case(2, (3, 5, 4), (2, 3, 3), 2, 16, biased=True)
    for which in range(4):
        inputs = case.inputs(torch.float32, on_backend)
        inputs[which] = strided(inputs[which], layout)
        check(case, inputs)


def test_expanded_gradient(on_backend):
    """`.sum().backward()` delivers a gradient with strides of zero."""
    case = CASES[0]
    inputs = [x.requires_grad_() for x in case.inputs(torch.float32, on_backend)]
    point_to_region_attention(*inputs, case.region).sum().backward()
    ones = torch.ones(case.query_shape, device=on_backend)
    _, expected = gradients(dense_reference(case.region), inputs, ones)
    torch.testing.assert_close([x.grad for x in inputs], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite(on_backend, bad, which):
    case = Case(1, (1, 6, 3), (1, 3, 3), 2, 16)
    inputs = case.inputs(torch.float32, on_backend)
    inputs[which][0, 0, 0, 0, 1, 3] = bad
    expected = reference.point_to_region_attention(*inputs, case.region)
    output = point_to_region_attention(*inputs, case.region)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())
    assert torch.isfinite(output[0, 0, 1]).all(), "a region without the bad value is not touched by it"


def test_extreme_scores_do_not_overflow(on_backend):
    case = Case(1, (1, 3, 3), (1, 3, 3), 1, 8)
    query, key, value = case.inputs(torch.float32, on_backend)
    output = point_to_region_attention(query * 1e4, key * 1e4, value, case.region)
    assert torch.isfinite(output).all()


def test_small_weights_are_as_accurate_as_large_ones(on_backend):
    """Two keys whose scores lie up to 100 apart, one query each: the relative error of the smaller weight.

    GPU kernels take powers of two of scores that carry a factor of log2(e), and its rounding: as if the score had been
    rounded once more.
    """
    apart = torch.arange(0, 100, 0.125)
    n = len(apart)
    query = torch.ones(1, 1, 1, n, 1, 1)
    key = torch.stack([torch.zeros(n), -apart], dim=1).reshape(1, 1, 1, 2 * n, 1, 1)
    value = torch.tensor([0.0, 1.0]).repeat(n).reshape(key.shape)
    output = point_to_region_attention(*(x.to(on_backend) for x in (query, key, value)), (1, 1, 2), 1.0)
    weight = output.double().cpu().flatten()
    exact = torch.sigmoid(-apart.double())
    normal = exact > 2 * torch.finfo(torch.float32).tiny
    relative = (weight - exact).abs() / exact
    powers_of_two = backends.forced_backend() in ("cuda", "emulated", "triton")
    allowed = (8 + (apart.double() if powers_of_two else 0)) * torch.finfo(torch.float32).eps
    assert (relative < allowed)[normal].all()
    assert weight[~normal].max() <= 4 * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(on_backend, dtype, biased):
    case = Case(1, (6, 9, 9), (1, 3, 3), 4, 32, biased=biased)
    inputs = case.inputs(dtype, on_backend)
    grad_output = torch.randn(case.query_shape, device=on_backend).to(dtype)

    def run():
        attention = lambda q, k, v, bias=None: point_to_region_attention(q, k, v, case.region, None, bias)  # noqa: E731
        output, grads = gradients(attention, inputs, grad_output)
        return [output, *grads]

    first = run()
    threads = torch.get_num_threads()
    try:
        # torch's own matrix products, which the reference is made of, depend on the number of threads.
        for count in (threads,) if backends.forced_backend() == "reference" else (1, 3, threads):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(on_backend, wanted):
    case = CASES[3]
    inputs = case.inputs(torch.float32, on_backend)
    grad_output = torch.randn(case.query_shape, device=on_backend)
    _, expected = gradients(dense_reference(case.region), inputs, grad_output)
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    point_to_region_attention(*leaves, case.region).backward(grad_output)
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, expected[i])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("biased", [False, True])
def test_few_queries_and_many_heads_are_cut_by_head(biased):
    """One region and 16 heads: the CPU kernel shares out heads; nothing may be lost between the shares."""
    case = Case(1, (2, 3, 3), (2, 3, 3), 13, 16, biased=biased)
    with use_backend("cpu"):
        check(case, case.inputs(torch.float32))


def test_huge_pages_can_be_turned_off(monkeypatch):
    case = Case(1, (8, 27, 27), (1, 3, 3), 8, 64)
    inputs = case.inputs(torch.float32)
    with use_backend("cpu"):
        on = point_to_region_attention(*inputs, case.region)
        monkeypatch.setenv("LLAVA_ST_HUGE_PAGES", "0")
        assert torch.equal(on, point_to_region_attention(*inputs, case.region))
