"""The bias of point-to-region attention: what masks a key, and how it is given."""

from __future__ import annotations

import math

import pytest
import torch

from llava_st_ops import point_to_region_attention, point_to_region_attention_packed, use_backend
from tests.attention_cases import Case, assert_matches_reference, gradients, packed_reference, random_bias
from tests.ops.test_packed import GRIDS, packed_inputs

pytestmark = pytest.mark.usefixtures("poisoned_results")
CASE = Case(2, (3, 7, 5), (2, 3, 3), 3, 40, 24, biased=True)


def attention(case):
    return lambda q, k, v, bias=None: point_to_region_attention(q, k, v, case.region, None, bias)


def packed_attention(grid_thw, region):
    return lambda q, k, v, bias=None: point_to_region_attention_packed(q, k, v, grid_thw, region, None, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 2, 2), (9, 9, 9)])
@pytest.mark.parametrize("grids", GRIDS[:3], ids=str)
def test_packed(on_backend, grids, region, dtype):
    (query, key, value), grid_thw = packed_inputs(grids, region, dtype=dtype, device=on_backend)
    bias = random_bias(key.shape[:-1], torch.Generator().manual_seed(0)).to(on_backend, dtype)
    plain = packed_reference(grid_thw, region)
    assert_matches_reference(packed_attention(grid_thw, region), plain, [query, key, value[..., :17], bias])


def test_a_bias_of_zero_changes_nothing(on_backend):
    query, key, value, _ = CASE.inputs(torch.float32, on_backend)
    plain = attention(CASE)(query, key, value)
    torch.testing.assert_close(attention(CASE)(query, key, value, torch.zeros_like(key[..., 0])), plain)


def test_a_boolean_mask_is_one_of_minus_infinity(on_backend):
    query, key, value, bias = CASE.inputs(torch.float32, on_backend)
    mask = bias > -math.inf
    bias = torch.where(mask, 0, bias)
    assert torch.equal(attention(CASE)(query, key, value, mask), attention(CASE)(query, key, value, bias))
    shared = mask[..., :1]
    expected = attention(CASE)(query, key, value, shared.expand_as(bias))
    assert torch.equal(attention(CASE)(query, key, value, shared), expected)


def test_a_bias_that_heads_share_gets_the_sum_of_their_gradients(on_backend):
    query, key, value, bias = CASE.inputs(torch.float32, on_backend)
    grad_output = torch.randn(CASE.output_shape, device=on_backend)
    shared = bias[..., 1:2]
    output, grads = gradients(attention(CASE), [query, key, value, shared], grad_output)
    expected, each = gradients(attention(CASE), [query, key, value, shared.expand_as(bias).contiguous()], grad_output)
    assert torch.equal(output, expected)
    torch.testing.assert_close(grads, [*each[:3], each[3].sum(-1, keepdim=True)])

    grid_thw = torch.tensor([[3, 7, 5]] * 2)
    query, key, value, shared, grad_output = (x.flatten(0, 3) for x in (query, key, value, shared, grad_output))
    packed, packed_grads = gradients(packed_attention(grid_thw, CASE.region), [query, key, value, shared], grad_output)
    assert torch.equal(packed, output.flatten(0, 3))
    torch.testing.assert_close(packed_grads, [x.flatten(0, 3) for x in grads])


@pytest.mark.parametrize("region", [(1, 3, 3), (3, 7, 5)])
def test_masked_keys_may_hold_anything(on_backend, region):
    """Padding is often not initialised: NaN there reaches no result and no gradient."""
    case = Case(1, (3, 7, 5), region, 3, 40, 24, biased=True)
    query, key, value, bias = case.inputs(torch.float32, on_backend)
    masked = (bias == -math.inf).unsqueeze(-1)
    grad_output = torch.randn(case.output_shape, device=on_backend)
    clean = gradients(attention(case), [query, key, value, bias], grad_output)
    spoiled = [query, key.masked_fill(masked, math.nan), value.masked_fill(masked, math.inf), bias]
    output, grads = gradients(attention(case), spoiled, grad_output)
    assert torch.isfinite(output).all()
    assert torch.equal(output, clean[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, clean[1], strict=True))
    for grad in (grads[1], grads[2], grads[3].unsqueeze(-1)):
        assert not torch.where(masked, grad, 0).any()


def test_a_region_without_keys_gives_zeros_and_no_gradient(on_backend):
    """Even where its query and the gradient of its output are not numbers."""
    case = Case(1, (1, 3, 6), (1, 3, 3), 2, 16, biased=True)
    query, key, value, bias = case.inputs(torch.float32, on_backend)
    bias = torch.zeros_like(bias)
    bias[:, :, :, :3, 0] = -math.inf
    query[:, :, :, 0, 0] = math.nan
    grad_output = torch.randn(case.output_shape, device=on_backend)
    grad_output[:, :, :, 0, 0] = math.nan
    output, (grad_query, *grads) = gradients(attention(case), [query, key, value, bias], grad_output)
    assert not output[:, :, :, 0, 0].any()
    assert not grad_query[:, :, :, 0, 0].any()
    assert not any(grad[:, :, :, :3, 0].any() for grad in grads)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(grad).all() for grad in (grad_query, *grads))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_biases_that_are_not_finite(on_backend, bad):
    case = Case(1, (1, 6, 3), (1, 3, 3), 2, 16, biased=True)
    query, key, value, bias = case.inputs(torch.float32, on_backend)
    bias = bias.clamp(min=-1)
    bias[0, 0, 0, 0, 1] = bad
    with use_backend("reference"):
        expected = attention(case)(query, key, value, bias)
    output = attention(case)(query, key, value, bias)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.isfinite(output[0, 0, 1]).all()


@pytest.mark.parametrize("wanted", [(3,), (0, 3), (0, 1, 2)])
def test_gradients_of_some_inputs_only(on_backend, wanted):
    inputs = CASE.inputs(torch.float32, on_backend)
    grad_output = torch.randn(CASE.output_shape, device=on_backend)
    _, expected = gradients(attention(CASE), inputs, grad_output)
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    attention(CASE)(*leaves).backward(grad_output)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            assert torch.equal(leaf.grad, expected[i])


def test_autocast_casts_it():
    inputs = CASE.inputs(torch.float32)
    expected = attention(CASE)(*(x.bfloat16() for x in inputs))
    raw = torch.ops.llava_st.point_to_region_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(CASE)(*inputs), expected)
        assert torch.equal(raw(*inputs[:3], CASE.region, None, inputs[3]), expected)
        assert torch.equal(raw(*inputs[:3], CASE.region, bias=inputs[3]), expected)


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (None, None, None, 0), (0, 0, 0, None)], ids=str)
def test_vmap(mapped):
    batch = [torch.stack(pair) for pair in zip(*(CASE.inputs(torch.float64, seed=s) for s in (0, 1)), strict=True)]
    arguments = [x if dim == 0 else x[0] for x, dim in zip(batch, mapped, strict=True)]
    output = torch.vmap(attention(CASE), in_dims=mapped)(*arguments)
    for i in range(2):
        expected = attention(CASE)(*(x[i] if dim == 0 else x for x, dim in zip(arguments, mapped, strict=True)))
        torch.testing.assert_close(output[i], expected)


def test_vmap_of_the_backward_op():
    query, key, value, bias = CASE.inputs(torch.float64)
    op = torch.ops.llava_st.point_to_region_attention_backward
    for biases in ((), (None, bias)):
        grads = torch.stack([torch.randn(CASE.output_shape, dtype=torch.float64) for _ in range(2)])
        mapped = torch.vmap(lambda g, b=biases: op(g, query, key, value, CASE.region, *b)[:3])(grads)
        for i in range(2):
            expected = op(grads[i], query, key, value, CASE.region, *biases)[:3]
            torch.testing.assert_close([x[i] for x in mapped], list(expected))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    case = Case(1, (2, 3, 4), (2, 2, 2), 2, 3, 5, biased=True)
    with use_backend(backend):
        query, key, value, bias = (x.requires_grad_() for x in case.inputs(torch.float64))
        finite = bias.detach().clamp(min=-1).requires_grad_()
        assert torch.autograd.gradcheck(attention(case), (query, key, value, finite))
        masked = bias.detach()
        assert torch.autograd.gradcheck(lambda *x: attention(case)(*x, masked), (query, key, value))
        shared = finite.detach()[..., :1].requires_grad_()
        assert torch.autograd.gradcheck(lambda b: attention(case)(query, key, value, b), (shared,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(query, key, value, bias):
        return attention(CASE)(query * 2, key, value, bias).square()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    inputs, grad_output = CASE.inputs(torch.float32), torch.randn(CASE.output_shape)
    torch.testing.assert_close(gradients(compiled, inputs, grad_output), gradients(step, inputs, grad_output))
    mask = inputs[3] > -math.inf
    torch.testing.assert_close(compiled(*inputs[:3], mask), step(*inputs[:3], mask))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 3, 7, 5, 2), ValueError, r"bias must have shape \[2, 3, 7, 5, 3\], got \[2, 3, 7, 5, 2\]"),
        (torch.zeros(3), ValueError, r"bias must have shape \[2, 3, 7, 5, 3\], got \[3\]"),
        (torch.zeros(2, 3, 7, 5, 3).double(), TypeError, "bias must have the dtype of query, torch.float32"),
        (torch.zeros(2, 3, 7, 5, 3, dtype=torch.int64), TypeError, "bias must have the dtype of query"),
        (torch.zeros(2, 3, 7, 5, 3, device="meta"), ValueError, "bias must be on the device of query"),
    ],
)
def test_errors(bias, error, message):
    inputs = CASE.inputs(torch.float32)[:3]
    with pytest.raises(error, match=f"point_to_region_attention: {message}"):
        attention(CASE)(*inputs, bias)
    if not bias.is_meta:
        with pytest.raises(RuntimeError, match="point_to_region_attention: bias must have"):
            torch.ops.llava_st.point_to_region_attention(*inputs, CASE.region, None, bias)


def test_errors_of_the_packed_form():
    (query, key, value), grid_thw = packed_inputs([(2, 3, 3)], (1, 3, 3))
    with pytest.raises(ValueError, match=r"_packed: bias must have shape \[18, 2\], got \[17, 2\]"):
        point_to_region_attention_packed(query, key, value, grid_thw, (1, 3, 3), bias=torch.zeros(17, 2))
