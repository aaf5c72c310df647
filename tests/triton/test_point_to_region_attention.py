"""The Triton kernels against the float64 reference: compiled on a GPU, interpreted elsewhere (see conftest.py).

The interpreter is wrong in bfloat16 without saying so, and slow: bfloat16 and large shapes run on a GPU only.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_st_ops import reference
from tests.attention_cases import EMPTY_CASES, Case
from tests.triton.comparing import (
    DTYPES,
    F16,
    F32,
    GPU,
    assert_all_close,
    assert_same_bits,
    ignores_numpy_warnings,
    needs_gpu,
    random_like,
    run_in_a_graph,
)

ROOT = Path(__file__).parents[2]
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of bias")
pytestmark = ignores_numpy_warnings


def check_dense(kernels, query, key, value, region, scale=None, grad_output=None, bias=None):
    shape = (*query.shape[:-1], value.shape[-1])
    g = random_like(shape, query.dtype, query.device) if grad_output is None else grad_output

    def by_reference(g, q, k, v, *bias):
        output = reference.point_to_region_attention(q, k, v, region, scale, *bias)
        return output, *reference.point_to_region_attention_backward(g, q, k, v, region, scale, *bias)

    actual = (
        kernels.forward(query, key, value, region, scale, bias),
        *kernels.backward(g, query, key, value, region, scale, bias),
    )
    tensors = (g, query, key, value, *([] if bias is None else [bias]))
    assert_all_close(actual, by_reference(*(t.double() for t in tensors)), by_reference(*tensors), NAMES)


def packed_oracle(query, key, value, grid_thw, region, grad_output, bias=None):
    """Output and gradients of the packed form for grids of any content, one query and one head at a time.

    Queries without keys, and keys without a query, take part in nothing.
    """
    added = torch.zeros_like(key[..., 0]) if bias is None else bias
    tensors = [x.detach().clone().requires_grad_() for x in (query, key, value, added)]
    q, k, v, added = tensors
    rows, first_query, first_token = [], 0, 0
    for grid in grid_thw.clamp(min=0).tolist():
        counts = [-(-size // step) for size, step in zip(grid, region, strict=True)]
        for number in range(min(math.prod(counts), len(q) - first_query)):
            at = (number // counts[2] // counts[1], number // counts[2] % counts[1], number % counts[2])
            axes = []
            for place, step, size, stride in zip(at, region, grid, (grid[1] * grid[2], grid[2], 1), strict=True):
                last = min((place + 1) * step, size, place * step + len(k))
                axes.append([i * stride for i in range(place * step, last)])
            tokens = [t for t in (first_token + sum(offsets) for offsets in itertools.product(*axes)) if t < len(k)]
            if tokens:
                scores = torch.einsum("hd,khd->kh", q[first_query + number], k[tokens]) * q.shape[-1] ** -0.5
                scores = scores + added[tokens]
                rows.append((first_query + number, torch.einsum("kh,khd->hd", scores.softmax(0), v[tokens])))
        first_query = min(first_query + math.prod(counts), len(q))
        first_token += math.prod(grid)
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    no_bias = [query.new_empty(0)] if bias is None else []
    count = 3 if bias is None else 4
    if not rows:
        return output, *(torch.zeros_like(x) for x in tensors[:count]), *no_bias
    output = output.index_put(
        (torch.tensor([i for i, _ in rows], device=query.device),), torch.stack([r for _, r in rows])
    )
    return output.detach(), *torch.autograd.grad(output, tensors[:count], grad_output), *no_bias


def check_packed(
    kernels, queries, tokens, grid_thw, region, heads=2, dim=8, dtype=F32, by=None, value_dim=None, biased=False
):
    """`by` computes what is expected; by default the reference, which wants grids that add up."""
    device = grid_thw.device
    value_dim = value_dim or dim
    query, g = (random_like((queries, heads, d), dtype, device, seed) for d, seed in ((dim, 2), (value_dim, 3)))
    key, value = (random_like((tokens, heads, d), dtype, device, seed) for d, seed in ((dim, 4), (value_dim, 5)))
    bias = random_like((tokens, heads), dtype, device, 6) if biased else None

    def by_reference(q, k, v, grid_thw, region, g, bias):
        output = reference.point_to_region_attention_packed(q, k, v, grid_thw, region, None, bias)
        return output, *reference.point_to_region_attention_packed_backward(g, q, k, v, grid_thw, region, None, bias)

    by = by or by_reference
    actual = (
        kernels.packed_forward(query, key, value, grid_thw, region, None, bias),
        *kernels.packed_backward(g, query, key, value, grid_thw, region, None, bias),
    )
    doubles = [None if x is None else x.double() for x in (query, key, value, g, bias)]
    exact = by(*doubles[:3], grid_thw, region, *doubles[3:])
    assert_all_close(actual, exact, by(query, key, value, grid_thw, region, g, bias), NAMES)


def totals(grid_thw, region):
    """Queries and tokens of grids."""
    queries = sum(math.prod(-(-s // r) for s, r in zip(grid, region, strict=True)) for grid in grid_thw.tolist())
    return queries, int(grid_thw.prod(1).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 40, 64, 128, 256])
def test_head_dims(kernels, device, dim, dtype):
    case = Case(1, (1, 4, 5), (1, 3, 3), 5 if dim == 256 else 3, dim)  # partial at two edges, heads of two blocks
    check_dense(kernels, *case.inputs(dtype, device), case.region)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, (2, 3, 6), (1, 3, 3), 2, 16),
        Case(1, (7, 1, 2), (5, 1, 1), 3, 16),
        Case(1, (6, 4, 3), (5, 3, 3), 2, 16),
        Case(1, (3, 4, 3), (2, 2, 2), 2, 16),
        Case(2, (2, 1, 3), (1, 1, 1), 1, 16),
        Case(1, (3, 4, 5), (3, 4, 5), 2, 16),  # the whole grid
        Case(2, (1, 2, 2), (10**12, 10**12, 10**12), 2, 16),  # far beyond it
        Case(1, (7, 6, 5), (5, 6, 5), 2, 16),  # two tiles, and one of a partial region
        Case(1, (3, 5, 5), (2, 5, 5), 2, 256),  # tiles of 32 keys
        Case(1, (6, 9, 9), (6, 9, 9), 3, 5),  # four tiles
    ],
    ids=str,
)
def test_regions(kernels, device, case, dtype):
    check_dense(kernels, *case.inputs(dtype, device), case.region)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, (1, 4, 6), (1, 3, 3), 3, 16, biased=True),
        Case(1, (7, 6, 5), (5, 6, 5), 2, 16, 5, biased=True),  # two tiles
        Case(1, (3, 4, 3), (2, 2, 2), 5, 7, 40, biased=True),
        Case(1, (2, 3, 4), (1, 2, 2), 2, 64, 16),
        Case(1, (3, 2, 4), (3, 2, 2), 2, 5, 24),
        Case(1, (1, 3, 6), (1, 3, 3), 2, 1152, biased=True),  # tiles of four keys
        Case(1, (1, 2, 3), (1, 2, 2), 1, 16, 1151),
        Case(1, (1, 3, 3), (1, 3, 3), 2, 0, 8, biased=True),  # scores are biases
        Case(1, (1, 3, 3), (1, 3, 3), 2, 8, 0, biased=True),
    ],
    ids=str,
)
def test_biases_and_widths_of_values(kernels, device, case, dtype):
    query, key, value, *bias = case.inputs(dtype, device)
    check_dense(kernels, query, key, value, case.region, bias=bias[0] if bias else None)


@pytest.mark.parametrize("region", [(1, 3, 3), (5, 6, 5)], ids=["one tile", "many tiles"])
def test_masked_keys_may_hold_anything(kernels, device, region):
    """So may queries without any other key, and the gradients of their outputs."""
    case = Case(1, (5, 6, 5), region, 2, 16, 8, biased=True)
    query, key, value, bias = case.inputs(F32, device)
    masked = (bias == -math.inf).unsqueeze(-1)
    key, value = key.masked_fill(masked, math.nan), value.masked_fill(masked, math.inf)
    g = random_like(case.output_shape, F32, device)
    query[0, 0, 0, 0, 0] = g[0, 0, 0, 0, 0] = math.nan
    check_dense(kernels, query, key, value, region, bias=bias, grad_output=g)
    assert all(torch.isfinite(x).all() for x in kernels.backward(g, query, key, value, region, None, bias))


def test_strided_bias(kernels, device):
    case = Case(2, (2, 3, 4), (1, 2, 3), 3, 8, biased=True)
    query, key, value, bias = case.inputs(F16, device)
    check_dense(
        kernels, query, key, value, case.region, bias=bias.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    )
    check_dense(kernels, query, key, value, case.region, bias=bias[..., 2:].expand_as(bias))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3])
def test_scales(kernels, device, scale):
    case = Case(1, (1, 4, 4), (1, 3, 3), 2, 8)
    check_dense(kernels, *case.inputs(F32, device), case.region, scale)


def _strided_views(case: Case, dtype, device):
    query, key, value = case.inputs(dtype, device)
    permuted = key.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    sliced = torch.stack((value, value), -1).flatten(-2)[..., ::2]
    shifted = torch.cat((query.flatten(), query.flatten()[:1]))[1:].view(query.shape)  # no whole vectors from the start
    return {
        "permuted": (query, permuted, permuted),
        "last dimension": (query, key, sliced),
        "unaligned": (shifted, key, value),
        "expanded": (query[..., :1, :].expand_as(query), key[:1].expand_as(key), value[..., :1].expand_as(value)),
    }


@pytest.mark.parametrize("region", [(1, 2, 3), (2, 12, 6)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("view", ["permuted", "last dimension", "unaligned", "expanded"])
def test_strides(kernels, device, view, region):
    case = Case(2, (2, 3, 4) if region[0] == 1 else (2, 12, 6), region, 2, 16)
    tensors = _strided_views(case, F16, device)[view]
    check_dense(kernels, *tensors, region)


def test_expanded_gradient(kernels, device):
    case = Case(1, (2, 3, 4), (1, 3, 3), 2, 16)
    query, key, value = case.inputs(F32, device)
    check_dense(kernels, query, key, value, case.region, grad_output=torch.ones((), device=device).expand_as(query))


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty(kernels, device, case):
    query, key, value, *bias = case.inputs(F32, device)
    output = kernels.forward(query, key, value, case.region, None, *bias)
    assert output.shape == case.output_shape
    grads = kernels.backward(output, query, key, value, case.region, None, *bias)
    assert [grad.shape for grad in grads] == [x.shape for x in (query, key, value, *(bias or [torch.empty(0)]))]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("region", [(1, 3, 3), (1, 14, 14)], ids=["one tile", "many tiles"])
def test_nan_and_infinity_spread_as_in_the_reference(kernels, device, region):
    case = Case(1, (8, region[1] + 1, region[2]), region, 1, 4)  # two regions a frame, one of them partial
    query, key, value = case.inputs(F32, device)
    query.abs_()
    inf, nan = math.inf, math.nan
    key[0, 0, 1, 1] = nan
    value[0, 1, 2, 2] = inf
    value[0, 1, -1, 0] = -inf
    value[0, 2, 0, 1] = nan
    key[0, 3] = -inf  # all scores -inf
    key[0, 4, :3, :, :, 0] = -inf  # in a large region: all scores of the first tile
    key[0, 5, 0, 1] = inf
    query[0, 6, 0, 0] = nan
    key[0, 7, -1, 0, :, 0] = -inf
    check_dense(kernels, query, key, value, region)
    g = random_like(query.shape, F32, device)
    g[0, 0] = inf
    g[0, 2] = nan
    check_dense(kernels, *case.inputs(F32, device), region, grad_output=g)


def test_scores_too_large_for_an_exponential(kernels, device):
    case = Case(1, (1, 3, 6), (1, 3, 3), 2, 16)
    query, key, value = case.inputs(F32, device)
    check_dense(kernels, query * 100, key, value, case.region)


@pytest.mark.parametrize(
    "case", [Case(1, (3, 4, 5), (2, 3, 2), 3, 8), Case(1, (3, 12, 12), (1, 12, 12), 2, 8)], ids=str
)
def test_counting_in_64_bits(kernels, device, monkeypatch, case):
    """What happens from 2**29 programs on, with a grid along two axes that is rounded up."""
    monkeypatch.setattr(kernels, "_WIDE_FROM", 0)
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 5)
    check_dense(kernels, *case.inputs(F16, device), case.region)
    grid_thw = torch.tensor([case.grid, (1, 2, 2)], device=device)
    check_packed(kernels, *totals(grid_thw, case.region), grid_thw, case.region, dtype=F16)


PACKED_GRIDS = [(1, 4, 3), (0, 5, 2), (2, 2, 5), (1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 2, 2), (1, 1, 1), (10**12,) * 3], ids=str)
def test_packed(kernels, device, region, dtype):
    grid_thw = torch.tensor(PACKED_GRIDS, device=device)
    check_packed(kernels, *totals(grid_thw, region), grid_thw, region, dtype=dtype)


def test_packed_many_tiles(kernels, device):
    grid_thw = torch.tensor([(2, 4, 6), (1, 0, 3), (3, 13, 13), (1, 5, 40)], device=device)
    check_packed(kernels, *totals(grid_thw, (2, 13, 13)), grid_thw, (2, 13, 13))


@pytest.mark.parametrize("region", [(1, 3, 3), (2, 13, 13)], ids=["one tile", "many tiles"])
def test_packed_biases_and_widths_of_values(kernels, device, region):
    grid_thw = torch.tensor([*PACKED_GRIDS, (2, 12, 3)], device=device)
    check_packed(kernels, *totals(grid_thw, region), grid_thw, region, heads=3, dim=8, value_dim=5, biased=True)


@pytest.mark.parametrize("dim", [7, 40, 128])
def test_packed_head_dims(kernels, device, dim):
    grid_thw = torch.tensor(PACKED_GRIDS, device=device)
    check_packed(kernels, *totals(grid_thw, (2, 3, 3)), grid_thw, (2, 3, 3), heads=5, dim=dim)


def test_packed_strided_int32_grid(kernels, device):
    grid_thw = torch.tensor(PACKED_GRIDS, dtype=torch.int32, device=device)
    padded = torch.full((3, 2 * len(PACKED_GRIDS)), -7, dtype=torch.int32, device=device)
    padded[:, ::2] = grid_thw.t()
    check_packed(kernels, *totals(grid_thw, (1, 3, 3)), padded.t()[::2], (1, 3, 3))


def test_packed_strided_tensors(kernels, device):
    grid_thw, region = torch.tensor(PACKED_GRIDS, device=device), (2, 3, 3)
    queries, tokens = totals(grid_thw, region)
    query, g = (random_like((4, 2, queries), F32, device, seed).permute(2, 1, 0) for seed in (2, 3))
    key = random_like((tokens, 1, 4), F32, device, 4).expand(-1, 2, -1)
    value = random_like((1, 2, 4), F32, device, 5).expand(tokens, -1, -1)
    actual = kernels.packed_backward(g, query, key, value, grid_thw, region, 0.3)
    dense = [x.contiguous() for x in (g, query, key, value)]
    for grad, expected in zip(actual, kernels.packed_backward(*dense, grid_thw, region, 0.3), strict=True):
        assert torch.equal(grad, expected)
    output = kernels.packed_forward(query, key, value, grid_thw, region, 0.3)
    assert torch.equal(output, kernels.packed_forward(*dense[1:], grid_thw, region, 0.3))


def test_packed_many_videos(kernels, device):
    """More videos than the kernel that adds them up takes at once, most of them empty."""
    grid_thw = torch.zeros((1100, 3), dtype=torch.int64, device=device)
    grid_thw[::60] = torch.tensor([1, 2, 3], device=device)
    grid_thw[5::60, :2] = 4
    check_packed(kernels, *totals(grid_thw, (1, 2, 2)), grid_thw, (1, 2, 2))


BIG = 2**62
MISMATCHED_GRIDS = {
    "no videos": [],
    "too few": [(1, 2, 3), (1, 2, 2)],
    "too many tokens": [(1, 4, 3), (2, 4, 5), (1, 3, 3)],
    "negative": [(1, 4, 3), (-1, 4, 3), (2, -2, -2), (1, 3, 2)],
    "huge": [(1, 2, 3), (BIG, BIG, BIG), (1, 3, 3)],
    "huge frame": [(1, 2, 3), (2, 2, BIG), (1, 3, 3)],
    "huge and empty": [(BIG, 0, BIG), (1, 2, 3), (0, BIG, BIG), (2, 2, 2)],
    "long": [(BIG, 2, 2)],
}


@pytest.mark.parametrize("region", [(1, 2, 2), (9, 5, 30)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("tokens", [21, 0], ids="{}-tokens".format)
@pytest.mark.parametrize("grids", MISMATCHED_GRIDS.values(), ids=MISMATCHED_GRIDS)
def test_packed_grids_that_do_not_add_up(kernels, device, grids, tokens, region):
    """Grids on a GPU are not read back, so nobody checks them: what is out of range takes part in nothing."""
    grid_thw = torch.tensor(grids, device=device, dtype=torch.int64).view(-1, 3)
    check_packed(kernels, 7 if tokens else 2, tokens, grid_thw, region, by=packed_oracle, heads=1, dim=4, dtype=F16)


@pytest.mark.parametrize("queries", [0, 1, 3, 7])
def test_packed_tokens_without_a_query(kernels, device, queries):
    grid_thw = torch.tensor([(1, 2, 3), (0, 1, 1), (2, 3, 3), (1, 1, 2)], device=device)
    check_packed(kernels, queries, 29, grid_thw, (1, 2, 2), by=packed_oracle, dtype=F16)
    check_packed(
        kernels, queries, 29, grid_thw, (1, 2, 2), by=packed_oracle, dtype=F16, heads=3, value_dim=300, biased=True
    )


def test_repeats_bit_by_bit(kernels, device):
    case = Case(1, (5, 9, 9), (5, 6, 5), 2, 16)
    query, key, value = case.inputs(F16, device)
    first, second = (kernels.backward(query, query, key, value, case.region, None) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_import_does_not_need_triton():
    """Without Triton the package imports, and says what is missing when a function is called."""
    program = """
import sys
sys.modules["triton"] = None  # what an import of it now raises is ModuleNotFoundError
import torch
from llava_st_ops.triton import forward
try:
    forward(torch.ones(1, 1, 1, 1, 1, 1), *(torch.ones(1, 1, 1, 1, 1, 1),) * 2, (1, 1, 1), None)
except ModuleNotFoundError as error:
    print(error.name)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["triton"], run.stderr


def test_other_tests_keep_their_triton(kernels):
    """While the interpreter's copy is in place it is the one in `sys.modules`; conftest.py puts the other back."""
    triton = sys.modules.get("triton")
    assert GPU or triton is None or triton.knobs.runtime.interpret


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("region", [(1, 3, 3), (5, 1, 1), (5, 3, 3)], ids=str)
def test_paper_shape(kernels, device, region, dtype):
    case = Case(1, (20, 27, 27), region, 8, 128)
    check_dense(kernels, *case.inputs(dtype, device), region)
    grid_thw = torch.tensor([(7, 27, 27), (1, 14, 45), (3, 20, 11)], device=device)
    check_packed(kernels, *totals(grid_thw, region), grid_thw, region, heads=8, dim=128, dtype=dtype)


@needs_gpu
def test_grids_on_the_device_are_not_read_back_and_calls_can_be_captured(kernels, device):
    grid_thw, region = torch.tensor(PACKED_GRIDS, device=device), (1, 3, 3)
    queries, tokens = totals(grid_thw, region)
    query, key = (random_like((n, 2, 16), F16, device) for n in (queries, tokens))

    def run():
        output = kernels.packed_forward(query, key, key, grid_thw, region, None)
        return output, *kernels.packed_backward(output, query, key, key, grid_thw, region, None)

    assert_same_bits(run_in_a_graph(run), run())
