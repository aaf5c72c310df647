"""What is special about the CUDA kernels of normalized region attention: which of them runs, alignment, precision.

They run in the emulator, through the raw ops. Shapes are as small as tell the kernels' parts from one another.
"""

from __future__ import annotations

import math

import pytest
import torch

from llava_st_ops import reference
from tests.attention_cases import Case as AttentionCase
from tests.attention_cases import assert_matches_reference, gradients
from tests.emulator.backend import DTYPES, emulated, launched
from tests.emulator.emulated_lape import INF, NAN, in_nan, raw

pytestmark = pytest.mark.usefixtures("poisoned_results", "ops")
EPS = 1e-5
HALVES = (torch.bfloat16, torch.float16)
TILE_KEYS, TILE_HEADS, TILE_WIDTH = 16, 32, 2048  # the most that the kernels of the tensor cores take


class Case(AttentionCase):
    """Keys `[batch, *grid, dim]`, which all heads share."""

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.grid, self.dim)

    @property
    def most_keys(self) -> int:
        return math.prod(map(min, self.region, self.grid))

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        """Query, key and value, such that scores are about as large as three."""
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(shape, generator=generator) for shape in (self.query_shape, self.key_shape, self.key_shape)
        )
        return [x.to(dtype) for x in (query * 3 / math.sqrt(max(self.dim, 1)), key, value)]


def attention(region, eps: float = EPS):
    """A function of query, key and value."""
    return lambda *tensors: raw().normalized_region_attention(*tensors, list(region), eps)


def plain(region, eps: float = EPS):
    return lambda *tensors: reference.normalized_region_attention(*tensors, region, eps)


def check(case: Case, inputs, eps: float = EPS) -> set[str]:
    """Returns the kernels that ran."""
    with launched() as names:
        assert_matches_reference(attention(case.region, eps), plain(case.region, eps), inputs)
    return set(names)


def kernels(case: Case, dtype: torch.dtype, vectors: bool = True) -> set[str]:
    """Those that shall run."""
    element = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}[dtype]
    elements = 16 // dtype.itemsize
    vectors = vectors and case.dim % elements == 0
    tile = dtype in HALVES and vectors and case.most_keys <= TILE_KEYS and case.dim <= TILE_WIDTH
    packets = f"<Packets<{element}, {elements if vectors else 1}> >"
    forward = f"normalized_tile_forward<{element}>" if tile else f"normalized_forward{packets}"
    if tile and case.heads <= TILE_HEADS:
        return {forward, f"normalized_tile_backward<{element}>"}
    return {forward, f"normalized_query_gradient{packets}", f"normalized_token_gradients{packets}"}


CASES = [
    Case(1, (1, 3, 6), (1, 3, 3), 8, 256),  # the spatial stream, narrower
    Case(1, (10, 1, 1), (5, 1, 1), 8, 64),  # the temporal stream
    Case(1, (1, 4, 4), (1, 4, 4), 9, 72),  # all rows of a matrix product, and heads beyond one
    Case(2, (3, 3, 4), (2, 2, 3), 3, 24),  # partial at every edge
    Case(1, (1, 4, 4), (1, 3, 3), 1, 8),
    Case(1, (1, 2, 2), (1, 1, 2), 16, 64),
    Case(1, (1, 1, 3), (1, 1, 2), 2, 136),  # the second warp has eight channels
    Case(1, (17, 1, 1), (17, 1, 1), 3, 64),  # more keys than the tensor cores take
    Case(1, (70, 1, 1), (69, 1, 1), 3, 16),  # more than one chunk of them
    Case(1, (1, 2, 2), (1, 2, 2), 33, 8),  # more heads than that takes in the backward pass, and than one chunk
    Case(1, (1, 2, 2), (1, 2, 2), 32, 8),  # as many as it takes
    Case(1, (1, 2, 1), (1, 2, 1), 1, 2056),  # more channels
    Case(1, (1, 2, 1), (1, 2, 1), 1, 2048),
    Case(1, (2, 2, 3), (1, 2, 2), 2, 7),  # rows that are no whole vectors
    Case(1, (3, 2, 1), (1, 1, 1), 2, 16),  # one key per region
    Case(1, (2, 3, 2), (9, 9, 9), 2, 16),  # the whole grid, as a larger region
    Case(2, (1, 1, 1), (1, 3, 3), 1, 1),  # one of everything
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    assert check(case, case.inputs(dtype)) == kernels(case, dtype)


def test_fewer_blocks_than_work():
    """Blocks take several regions each: what is left in shared memory is not taken for the next one's."""
    case = Case(2, (2, 4, 4), (1, 3, 3), 3, 16)
    for dtype in (torch.float32, torch.bfloat16):
        with emulated(max_blocks=2):
            check(case, case.inputs(dtype))


EMPTY = [
    Case(0, (2, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (0, 3, 3), (1, 3, 3), 2, 8),
    Case(1, (2, 3, 0), (1, 3, 3), 2, 8),
    Case(1, (2, 3, 3), (1, 3, 3), 0, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(case, dtype):
    """Without heads there are gradients of keys and values all the same."""
    inputs = case.inputs(dtype)
    output, grads = gradients(attention(case.region), inputs, torch.zeros(case.query_shape, dtype=dtype))
    assert output.shape == case.query_shape
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    assert not any(grad.any() for grad in grads)


# Precision ------------------------------------------------------------------------------------------------------------

SPATIAL = Case(1, (1, 3, 6), (1, 3, 3), 3, 136)
MANY = Case(1, (5, 3, 3), (5, 3, 3), 2, 64)  # for the general kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SPATIAL, MANY], ids=["tile", "general"])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_large_means(case, dtype, which):
    inputs = case.inputs(dtype)
    inputs[which] = (inputs[which].float() + 100).to(dtype)
    check(case, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SPATIAL, MANY], ids=["tile", "general"])
def test_tiny_variances(case, dtype):
    query, key, value = case.inputs(dtype)
    check(case, [query, key * 2**-10, value * 2**-10])
    almost_constant = torch.full_like(key, 100.0)
    almost_constant[..., 5] += torch.linspace(0.5, 4, almost_constant[..., 5].numel()).view(almost_constant.shape[:-1])
    check(case, [query, almost_constant, almost_constant.flip(-1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SPATIAL, MANY], ids=["tile", "general"])
def test_rows_of_all_sizes(case, dtype):
    """The smaller a row's deviation, the larger its factor: those of large rows must not be lost beside it."""
    query, key, value = case.inputs(dtype)
    sizes = torch.tensor([2.0**-6, 2.0**12, 1.0]).repeat(15)[: math.prod(case.grid)].view(case.grid).unsqueeze(-1)
    check(case, [query, (key * sizes).to(dtype), (value * sizes).to(dtype)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_gradients(dtype):
    """All but what the last rounding takes is there: factors do not lose what the dtype has no digits or range for."""
    inputs = SPATIAL.inputs(dtype)
    grad_output = (torch.randn(SPATIAL.query_shape, generator=torch.Generator().manual_seed(1)) * 2**-10).to(dtype)
    _, grads = gradients(attention(SPATIAL.region), inputs, grad_output)
    _, exact = gradients(plain(SPATIAL.region), [x.double() for x in inputs], grad_output.double())
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    for grad, wanted in zip(grads, exact, strict=True):
        rounded = wanted.to(dtype).double()
        assert ((grad.double() - rounded).abs() <= torch.finfo(dtype).eps * wanted.abs() + smallest).all()
        assert (grad.double() == rounded).double().mean() > 0.99


@pytest.mark.parametrize("case", [SPATIAL, MANY], ids=["tile", "general"])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(case, eps):
    check(case, case.inputs(torch.bfloat16), eps)


@pytest.mark.parametrize("case", [SPATIAL, MANY], ids=["tile", "general"])
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_no_variance_and_no_eps(case, which):
    """A row without variance cannot be normalised then."""
    inputs = case.inputs(torch.float16)
    inputs[which][0, 0, 1, 1] = 0.5
    check(case, inputs, 0.0)


# Strides and alignment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("at", "spare", "vectors"),
    [(0, 8, True), (8, 8, True), (1, 7, False), (0, 1, False)],
    ids=["strided", "shifted", "unaligned pointer", "unaligned rows"],
)
def test_views_into_nan(dtype, at, spare, vectors):
    case = Case(1, (2, 3, 4), (1, 3, 3), 2, 24)
    assert check(case, [in_nan(x, at, spare) for x in case.inputs(dtype)]) == kernels(case, dtype, vectors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_one_unaligned_tensor(dtype, which):
    case = Case(1, (2, 3, 6), (1, 3, 3), 2, 32)
    inputs = case.inputs(dtype)
    inputs[which] = in_nan(inputs[which], 1, 7)
    assert check(case, inputs) == kernels(case, dtype, vectors=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("region", [(1, 2, 3), (3, 3, 2)], ids=["tile", "general"])
def test_permuted_and_expanded(dtype, region):
    case = Case(2, (3, 4, 3), region, 2, 32)
    query, key, value = case.inputs(dtype, seed=1)
    key = key.permute(1, 3, 2, 0, 4).contiguous().permute(3, 0, 2, 1, 4)  # time outermost, width before height
    value = value[:1, :, :1].expand(value.shape)
    query = query.transpose(0, 4).contiguous().transpose(0, 4)
    check(case, [query, key, value])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_contiguous(dtype):
    case = Case(1, (1, 3, 3), (1, 3, 3), 2, 8)
    inputs = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in case.inputs(dtype)]
    assert all(x.stride(-1) > 1 for x in inputs)
    check(case, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_grad_output(dtype):
    case = Case(1, (1, 3, 6), (1, 3, 3), 2, 16)
    inputs = case.inputs(dtype)
    row = torch.randn(16).to(dtype)
    expanded, contiguous = row.expand(case.query_shape), row.repeat(*case.query_shape[:-1], 1)
    _, grads = gradients(attention(case.region), inputs, expanded)
    _, expected = gradients(attention(case.region), inputs, contiguous)
    assert all(map(torch.equal, grads, expected))


# Determinism, NaN and infinities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPATIAL, Case(1, (2, 3, 4), (2, 3, 3), 2, 16)], ids=["tile", "general"])
def test_the_order_of_threads_does_not_matter(case):
    inputs = case.inputs(torch.bfloat16)
    grad_output = torch.randn(case.query_shape).bfloat16()
    results = []
    for seed in range(6):
        with emulated(seed=seed):
            output, grads = gradients(attention(case.region), inputs, grad_output)
        results.append([output, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 3, 3)], ids=["tile", "general"])
@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_and_infinity(dtype, region, special, which):
    case = Case(1, (2, 3, 6), region, 2, 16)
    inputs = case.inputs(dtype)
    if which == 0:
        inputs[0][0, 0, 0, 1, 1, 5] = special
    else:
        for h, w in ((0, 0), (2, 2)):  # at the beginning and at the end of a region
            inputs[which][0, 0, h, w, 5] = special
    check(case, inputs)
