"""Results of normalized_region_attention and its gradients, on every backend and dtype, and what torch asks of it."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import normalized_region_attention, reference, use_backend
from tests.attention_cases import CASES, Case, gradients
from tests.position_cases import DTYPES, NAN, assert_matches, namespace, skip_without_kernel

OP = "normalized_region_attention"
NAMES = ("query", "key", "value")
pytestmark = pytest.mark.usefixtures("poisoned_results")
# Those of the plain attention without what this op has not: a bias, values of another width. Besides them the width of
# the packer's heads together, as many heads as it has and more, a single channel, and regions of as many keys as a tile
# of a tensor core has, and one more.
NORMALIZED_CASES = [
    *(case for case in CASES if not case.biased and case.value_dim is None),
    Case(1, (1, 3, 6), (1, 3, 3), 8, 256),
    Case(1, (1, 2, 4), (1, 2, 4), 9, 64),
    Case(1, (2, 4, 4), (1, 4, 4), 16, 64),
    Case(1, (1, 1, 17), (1, 1, 17), 3, 72),
    Case(2, (1, 2, 2), (1, 2, 2), 2, 1),
]


def inputs_of(case: Case, dtype=torch.float64, device="cpu", seed=0) -> list[torch.Tensor]:
    """Query, key and value; the keys and values of one head serve all."""
    query, key, value = case.inputs(torch.float64, seed=seed)
    query = query * (2 * max(case.dim, 1) ** -0.5)  # scores of about 2
    return [x.to(device, dtype) for x in (query, key[..., 0, :] * 2 + 0.5, value[..., 0, :] - 1)]


def plain(region, eps=1e-5):
    return lambda q, k, v: reference.normalized_region_attention(q, k, v, region, eps)


def op(region, eps=1e-5):
    return lambda q, k, v: normalized_region_attention(q, k, v, region, eps)


def check(case: Case, inputs, eps=1e-5):
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    assert_matches(op(case.region, eps), plain(case.region, eps), inputs, NAMES, grad)


def naive(query, key, value, region, eps):
    """One query at a time, by the definition: an oracle that shares nothing with the reference."""
    output = torch.zeros_like(query)
    for b, t, h, w, head in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:5])).tolist():
        block = tuple(slice(i * step, (i + 1) * step) for i, step in zip((t, h, w), region, strict=True))
        keys, values = (x[b][block].flatten(0, 2) for x in (key, value))
        keys, values = (
            torch.stack([(row - row.mean()) / (row.var(correction=0) + eps).sqrt() for row in x])
            for x in (keys, values)
        )
        output[b, t, h, w, head] = torch.softmax(keys @ query[b, t, h, w, head], 0) @ values
    return output


@pytest.mark.parametrize("case", NORMALIZED_CASES, ids=str)
def test_reference_is_the_definition(case):
    query, key, value = inputs_of(case)
    expected = naive(query, key, value, case.region, 1e-3)
    actual = reference.normalized_region_attention(query, key, value, case.region, 1e-3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", NORMALIZED_CASES, ids=str)
def test_reference_backward_is_the_derivative(case):
    inputs = inputs_of(case)
    grad_output = torch.randn_like(inputs[0])
    _, expected = gradients(plain(case.region), inputs, grad_output)
    actual = reference.normalized_region_attention_backward(grad_output, *inputs, case.region)
    torch.testing.assert_close(list(actual), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMALIZED_CASES, ids=str)
def test_matches_reference(on_backend, case, dtype):
    skip_without_kernel(OP, on_backend, dtype)
    check(case, inputs_of(case, dtype, on_backend))


@pytest.mark.parametrize(
    "case",
    [
        Case(0, (2, 3, 3), (1, 3, 3), 2, 8),
        Case(1, (0, 3, 3), (1, 3, 3), 2, 8),
    ],
    ids=str,
)
def test_empty(on_backend, case):
    inputs = inputs_of(case, torch.float32, on_backend)
    output, grads = gradients(op(case.region), inputs, torch.empty_like(inputs[0]))
    assert output.shape == inputs[0].shape
    assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_no_heads(on_backend):
    """Nothing depends on keys and values."""
    query, key, value = inputs_of(Case(1, (2, 3, 3), (1, 3, 3), 1, 8), torch.float32, on_backend)
    query = query[..., :0, :]
    _, grads = gradients(op((1, 3, 3)), [query, key, value], torch.empty_like(query))
    assert grads[0].shape == query.shape
    assert not grads[1].any()
    assert not grads[2].any()


def test_large_means_and_small_variances(on_backend):
    """Rows far from zero keep their variance; rows without any give zeros, by eps."""
    case = Case(1, (2, 3, 3), (1, 3, 3), 8, 64)
    query, key, value = inputs_of(case, torch.float32, on_backend)
    check(case, [query, key + 100, value - 300])
    key[:, :, 1], value[:, :, 2] = 5.0, -2.0
    check(case, [query, key, value])


def test_eps(on_backend):
    case = Case(1, (1, 3, 3), (1, 3, 3), 2, 16)
    inputs = inputs_of(case, torch.float32, on_backend)
    for eps in (0.0, 0.5):
        check(case, inputs, eps)


def test_decided_softmax(on_backend):
    """Scores of hundreds: one key takes all, without overflow."""
    case = Case(1, (2, 3, 3), (1, 3, 3), 3, 64)
    query, key, value = inputs_of(case, torch.float32, on_backend)
    check(case, [query * 100, key, value])


def test_strided(on_backend):
    """Heads before tokens, as a batched product gives absorbed queries; channels that are not contiguous; gradients
    that are one number."""
    case = Case(2, (3, 4, 5), (2, 3, 3), 3, 24)
    query, key, value = inputs_of(case, torch.float32, on_backend)
    query = query.movedim(4, 0).contiguous().movedim(0, 4)
    key = key.transpose(1, 3).contiguous().transpose(1, 3)
    value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.full((*key.shape[:-1], 30), NAN, device=on_backend)
    wide[..., 3:27] = key
    check(case, [query, wide[..., 3:27], value])
    inputs = [query, key, value]
    one = torch.ones((), device=on_backend)
    expanded = gradients(op(case.region), inputs, one.expand_as(query))
    torch.testing.assert_close(expanded, gradients(op(case.region), inputs, torch.ones_like(query)), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_nan_and_inf_stay_in_their_region(on_backend, bad):
    case = Case(1, (1, 3, 9), (1, 3, 3), 8, 64)
    query, key, value = inputs_of(case, torch.float32, on_backend)
    clean = normalized_region_attention(query, key, value, case.region)
    key[0, 0, 1, 1, 5] = bad  # of the first region
    value[0, 0, 1, 4, 7] = bad  # of the second
    output, grads = gradients(op(case.region), [query, key, value], torch.ones_like(query))
    assert output[0, 0, 0, :2].isnan().all()
    assert torch.equal(output[0, 0, 0, 2], clean[0, 0, 0, 2])
    for grad in grads[1:]:
        assert grad[..., 6:, :].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(on_backend, dtype):
    case = Case(2, (3, 6, 7), (1, 3, 3), 8, 64)
    inputs = inputs_of(case, dtype, on_backend)
    grad = torch.randn_like(inputs[0])
    first = gradients(op(case.region), inputs, grad)
    again = gradients(op(case.region), inputs, grad)
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))


def test_any_number_of_threads():
    case = Case(2, (3, 6, 7), (1, 3, 3), 8, 64)
    inputs = inputs_of(case, torch.float32)
    grad, threads, found = torch.randn_like(inputs[0]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output, grads = gradients(op(case.region), inputs, grad)
            found.append([output, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# What torch asks ------------------------------------------------------------------------------------------------------

CASE = Case(2, (3, 4, 5), (2, 3, 3), 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(on_backend, dtype):
    skip_without_kernel(OP, on_backend, dtype)
    ops = getattr(torch.ops, namespace())
    inputs = inputs_of(CASE, dtype, on_backend)
    grad = torch.randn_like(inputs[0])
    torch.library.opcheck(ops.normalized_region_attention_backward, (grad, *inputs, list(CASE.region)))
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.normalized_region_attention, (*leaves, list(CASE.region)))
    torch.library.opcheck(ops.normalized_region_attention, (*leaves, list(CASE.region)), {"eps": 0.5})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    with use_backend(backend):
        inputs = [x.requires_grad_() for x in inputs_of(Case(1, (2, 1, 3), (2, 1, 2), 2, 3))]
        assert torch.autograd.gradcheck(op((2, 1, 2), 0.1), inputs)


def test_higher_derivatives_take_the_reference():
    inputs = [x.requires_grad_() for x in inputs_of(Case(1, (1, 2, 2), (1, 2, 2), 2, 3))]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(op((1, 2, 2), 0.1), inputs)
    output = normalized_region_attention(*inputs, (1, 2, 2))
    (grad,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, found = torch.func.jvp(op((1, 2, 2)), tuple(inputs), tangents)
    _, wanted = torch.func.jvp(plain((1, 2, 2)), tuple(inputs), tangents)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(op(CASE.region), fullgraph=True, dynamic=dynamic)
    inputs = inputs_of(CASE, torch.float32)
    grad = torch.randn_like(inputs[0])
    torch.testing.assert_close(gradients(compiled, inputs, grad), gradients(op(CASE.region), inputs, grad))


def test_autocast():
    inputs = inputs_of(CASE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        public = normalized_region_attention(*inputs, CASE.region)
        raw = torch.ops.llava_st.normalized_region_attention(*inputs, list(CASE.region))
    assert public.dtype == raw.dtype == torch.bfloat16
    assert torch.equal(public, normalized_region_attention(*(x.bfloat16() for x in inputs), CASE.region))


BAD = [
    ({"query": torch.randn(2, 3)}, ValueError, "query must have 6 dimensions", "got 2"),
    ({"key": torch.randn(2, 3, 4, 5, 1, 8)}, ValueError, "key must have 5 dimensions", "got 6"),
    ({"value": torch.randn(2, 3, 4, 5, 9)}, ValueError, r"value must have shape \[2, 3, 4, 5, 8\]", "got"),
    ({"query": torch.randn(2, 2, 2, 1, 2, 8)}, ValueError, r"query must have shape \[2, 2, 2, 2, 2, 8\]", "got"),
    ({"key": torch.randn(2, 3, 4, 5, 8).half()}, TypeError, "key must have the dtype of query", "float16"),
    ({"region": [2, 3]}, ValueError, "region must be three positive sizes", r"got \[2, 3\]"),
    ({"eps": -1.0}, ValueError, "eps must be a finite number, not below 0", "-1"),
    ({"eps": NAN}, ValueError, "eps must be a finite number, not below 0", "nan"),
]


@pytest.mark.parametrize(("change", "error", "expected", "found"), BAD)
def test_errors(change, error, expected, found):
    query, key, value = inputs_of(CASE, torch.float32)
    call = {"query": query, "key": key, "value": value, "region": [2, 3, 3], "eps": 1e-5, **change}
    with pytest.raises(error, match=f"normalized_region_attention: {expected}.*{found}"):
        normalized_region_attention(**call)
    with pytest.raises(RuntimeError, match=f"{expected}.*{found}"):
        torch.ops.llava_st.normalized_region_attention(**call)


def test_no_channels_is_an_error():
    query, key = torch.randn(1, 1, 1, 1, 2, 0), torch.randn(1, 1, 2, 2, 0)
    with pytest.raises(ValueError, match="at least one channel"):
        normalized_region_attention(query, key, key, (1, 2, 2))
    with pytest.raises(RuntimeError, match="at least one channel"):
        torch.ops.llava_st.normalized_region_attention(query, key, key, [1, 2, 2])


def test_an_eps_that_no_float_holds_is_an_error():
    x = torch.ones(1, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="eps must be a finite number"):
        normalized_region_attention(x.unsqueeze(-2), x, x, (1, 1, 1), eps=10**400)
