"""The Triton kernels of linear_lape_gelu and gelu_linear_gradient against the float64 reference, and lape_mlp on
them."""

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

pytestmark = ignores_numpy_warnings


@pytest.fixture
def mlp(launchers):
    return launchers("lape_mlp")


def first_layer(grid, inner, channels, dtype, device, table_dtype=None, batch=1):
    """features, weight, bias and the three tables."""
    features = random_like((batch, *grid, inner), dtype, device, 1)
    weight = (random_like((channels, inner), F32, device, 2) * max(inner, 1) ** -0.5).to(dtype)
    shapes = ((channels,), *((size, channels) for size in grid))
    return features, weight, *(random_like(s, table_dtype or dtype, device, n) for n, s in enumerate(shapes, 3))


def check_forward(mlp, tensors, keep=True):
    actual = mlp.linear_lape_gelu(*tensors, keep)
    exact = reference.linear_lape_gelu(*(x.double() for x in tensors), keep)
    assert_all_close(actual, exact, reference.linear_lape_gelu(*tensors, keep), ("activation", "preactivation"))
    return actual


def check_gradient(mlp, tensors):
    actual = mlp.gelu_linear_gradient(*tensors)
    exact = reference.gelu_linear_gradient(*(x.double() for x in tensors))
    names = ("gradient", "activation")
    assert_all_close(actual, exact, reference.gelu_linear_gradient(*tensors), names)
    return actual


def second_layer(tokens, outer, channels, dtype, device):
    """grad_output, weight and preactivation."""
    weight = (random_like((outer, channels), F32, device, 2) * max(outer, 1) ** -0.5).to(dtype)
    return random_like((tokens, outer), dtype, device, 1), weight, random_like((tokens, channels), dtype, device, 3) * 2


SHAPES = [
    # batch, grid, K, N
    (2, (3, 4, 5), 16, 24),
    (1, (1, 1, 1), 1, 1),
    (1, (11, 2, 3), 8, 40),  # more frames than a program takes
    (3, (5, 1, 2), 8, 7),  # frames of several videos in a program
    (1, (2, 2, 7), 12, 600),  # two blocks of channels, and of columns
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("batch", "grid", "inner", "channels"), SHAPES, ids=str)
def test_forward(mlp, device, batch, grid, inner, channels, keep, dtype):
    tensors = first_layer(grid, inner, channels, dtype, device, batch=batch)
    _, kept = check_forward(mlp, tensors, keep)
    assert kept.numel() == (batch * math.prod(grid) * channels if keep else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outer", "channels"), [(17, 8, 24), (1, 1, 1), (33, 16, 7), (9, 5, 600)], ids=str)
def test_gradient(mlp, device, tokens, outer, channels, dtype):
    check_gradient(mlp, second_layer(tokens, outer, channels, dtype, device))


@pytest.mark.parametrize(("dtype", "table_dtype"), [(F16, F32), (F32, F16)], ids=str)
def test_tables_of_another_dtype(mlp, device, dtype, table_dtype):
    check_forward(mlp, first_layer((2, 3, 4), 8, 24, dtype, device, table_dtype))


def test_strides(mlp, device):
    features, weight, bias, *tables = first_layer((2, 3, 4), 16, 24, F16, device, batch=2)
    dims = (4, 3, 2, 1, 0)
    features = features.permute(dims).contiguous().permute(dims)
    tables = [tables[0].t().contiguous().t(), tables[1].repeat(2, 2)[::2, ::2], tables[2][:1].expand(4, 24)]
    check_forward(mlp, (features, weight.t().contiguous().t(), bias[:1].expand(24), *tables))


@pytest.mark.parametrize("number", [0, 1])
def test_preactivations_of_one_mlp_of_several(mlp, device, number):
    """A slice of columns, as `lape_mlp` passes it."""
    grad_output, weight, preactivation = second_layer(9, 8, 48, F16, device)
    columns = preactivation.chunk(2, -1)[number]
    check_gradient(mlp, (grad_output, weight.chunk(2, -1)[number], columns))
    assert not columns.is_contiguous()


def test_gradient_strides(mlp, device):
    grad_output, weight, preactivation = second_layer(9, 8, 24, F16, device)
    check_gradient(mlp, (grad_output[:1].expand(9, 8), weight.t().contiguous().t(), preactivation.t().contiguous().t()))
    check_gradient(mlp, (grad_output.t().contiguous().t(), weight, preactivation[:, :1].expand(9, 24)))


def test_nothing_is_written_to_the_inputs(mlp, device):
    for function, tensors in (
        (mlp.linear_lape_gelu, first_layer((2, 2, 3), 8, 16, F32, device)),
        (mlp.gelu_linear_gradient, second_layer(9, 8, 16, F32, device)),
    ):
        before = [x.clone() for x in tensors]
        function(*tensors)
        assert_same_bits(tensors, before)


@pytest.mark.parametrize(
    ("batch", "grid", "inner", "channels"),
    [
        (0, (2, 3, 4), 8, 8),
        (1, (0, 3, 4), 8, 8),
        (1, (2, 0, 4), 8, 8),
        (1, (2, 3, 0), 8, 8),
        (1, (2, 3, 4), 0, 8),
        (1, (2, 3, 4), 8, 0),
    ],
    ids=str,
)
def test_empty(mlp, device, batch, grid, inner, channels):
    check_forward(mlp, first_layer(grid, inner, channels, F32, device, batch=batch))
    check_gradient(mlp, second_layer(batch * math.prod(grid), inner, channels, F32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinity_and_far_from_zero(mlp, device, dtype):
    """As in the reference: where nothing is finite, and where the GELU is x or 0."""
    tensors = first_layer((2, 3, 4), 8, 24, dtype, device)
    tensors[2][0], tensors[3][0, 1], tensors[4][1, 2], tensors[5][2, 3] = math.nan, math.inf, -math.inf, math.nan
    tensors[2][4:9] = torch.tensor([-40, -9, -5, 9, 1000])
    check_forward(mlp, tensors)
    grad_output, weight, preactivation = second_layer(5, 8, 8, dtype, device)
    preactivation[0] = torch.tensor([-1000, -9, -5, 0, 5, 1000, math.inf, -math.inf])
    preactivation[1, 0] = grad_output[3, 0] = math.nan
    grad_output[4, 1] = math.inf
    check_gradient(mlp, (grad_output, weight, preactivation))


def mlp_inputs(count, dtype, device, table_dtype=None):
    """The tensors that `lape_mlp` takes, flat: the first layers, the second weights and the second biases."""
    grid, inner, channels, outer = (2, 3, 4), 12, 16, 10
    first = first_layer(grid, inner, count * channels, dtype, device, table_dtype)
    shapes = [(outer, channels)] * count + [(outer,)] * count
    second = [random_like(s, F32, device, n).mul(0.25).to(dtype) for n, s in enumerate(shapes, 20)]
    return [*first, *second]


def call(count, features, weight, bias, *others):
    positions, weights, biases = others[:3], others[3 : 3 + count], others[3 + count :]
    return llava_st_ops.lape_mlp(features, weight, bias, positions, weights, biases)


def outputs_and_gradients(backend, count, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with llava_st_ops.use_backend(backend):
        outputs = call(count, *leaves)
        grads = [random_like(x.shape, F32, x.device, n).to(x.dtype) for n, x in enumerate(outputs, 40)]
        return [x.detach() for x in outputs], torch.autograd.grad(outputs, leaves, grads)


@pytest.mark.parametrize(
    ("dtype", "table_dtype"), [(F32, F32), (F16, F16), (F16, F32)], ids=["fp32", "fp16", "fp16 and fp32 tables"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_lape_mlp(mlp, device, count, dtype, table_dtype):
    """Outputs and all gradients, of several MLPs side by side."""
    tensors = mlp_inputs(count, dtype, device, table_dtype)
    actual = outputs_and_gradients("triton", count, tensors)
    exact = outputs_and_gradients("reference", count, [x.double() for x in tensors])
    same = outputs_and_gradients("reference", count, tensors)
    names = ["output"] * count, ["features", "weight", "bias", "temporal", "height", "width", *["second"] * 2 * count]
    for *triple, kind in zip(actual, exact, same, names, strict=True):
        assert_all_close(*triple, kind)


def test_lape_mlp_without_gradients(mlp, device):
    """Then no preactivations are kept; the outputs are the same."""
    tensors = mlp_inputs(2, F16, device)
    with llava_st_ops.use_backend("triton"):
        outputs = call(2, *tensors)
    assert_same_bits(outputs, outputs_and_gradients("triton", 2, tensors)[0])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper_shape(mlp, device, dtype):
    check_forward(mlp, first_layer((10, 27, 27), 1152, 2048, dtype, device))
    check_gradient(mlp, second_layer(7290, 1024, 1024, dtype, device))


@needs_gpu
def test_calls_can_be_captured(mlp, device):
    first, second = first_layer((2, 3, 4), 16, 24, F16, device), second_layer(9, 8, 24, F16, device)

    def run():
        return *mlp.linear_lape_gelu(*first, True), *mlp.gelu_linear_gradient(*second)

    assert_same_bits(run_in_a_graph(run), run())
