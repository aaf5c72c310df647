"""What is special about the CUDA kernels of point-to-region attention: layouts, alignment, chunks, grids on the device.

They run in the emulator. The tests of all backends (tests/ops) run there too; these go through the raw ops.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_cases import (
    CASES,
    Case,
    assert_matches_reference,
    dense_reference,
    gradients,
    packed_reference,
    random_bias,
)
from tests.emulator.backend import DTYPES, NAMESPACE, emulated, launched
from tests.emulator.build import load

pytestmark = pytest.mark.usefixtures("poisoned_results", "ops")
NAN = math.nan

# One case for every width of rows that has a layout of its own, and for rows of single elements.
WIDTHS = [Case(1, (2, 4, 5), (1, 3, 3), 2, dim) for dim in (1, 3, 8, 32, 40, 64, 72, 128, 160, 256)]
MANY_CHUNKS = [Case(1, (5, 4, 6), (5, 3, 3), 2, dim) for dim in (3, 32, 64, 128, 160, 256)]
# The same for kernels that know of biases and of values of another width; wide rows have no others.
EXTENDED = [Case(1, (2, 4, 5), (1, 3, 3), 2, dim, biased=True) for dim in (3, 32, 64, 128, 160, 256, 259, 512, 1152)]
EXTENDED += [Case(1, (5, 4, 6), (5, 3, 3), 2, dim, biased=True) for dim in (3, 32, 64, 128, 160, 256)]
EXTENDED += [Case(1, (2, 4, 5), (2, 2, 3), 2, *dims) for dims in ((24, 64), (72, 8), (8, 7), (16, 1152), (520, 40))]


def attention(region, scale=None, grid_thw=None):
    """A function of query, key and value."""
    ops = getattr(torch.ops, NAMESPACE)
    if grid_thw is None:
        return lambda q, k, v, *bias: ops.point_to_region_attention(q, k, v, list(region), scale, *bias)
    return lambda q, k, v, *bias: ops.point_to_region_attention_packed(q, k, v, grid_thw, list(region), scale, *bias)


def layout(dtype, dim, vectors, keys, value_dim=None, biased=False) -> str:
    """The layout of a problem, as `layouts` tells it."""
    return load().layout(str(dtype), dim, vectors, keys, dim if value_dim is None else value_dim, biased)


def layouts(names) -> set[str]:
    """Of the attention kernels among them: elements, lanes, vectors and steps, whether a chunk holds all keys, and
    whether there may be a bias."""
    pattern = r"attention_\w+<(.*)Layout<[\w:]+, (\d+), (\d+), (\d+), (\d+), (true|false)>"
    found = [match for name in names if (match := re.search(pattern, name))]
    return {
        " ".join([*match.groups()[1:5], "many" if match[6] == "true" else "few"])
        + (" extended" if "Extended" in match[1] else "")
        for match in found
    }


def check_dense(case: Case, dtype: torch.dtype, scale: float | None = None, seed: int = 0) -> None:
    inputs = case.inputs(dtype, seed=seed)
    assert_matches_reference(attention(case.region, scale), dense_reference(case.region, scale), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*WIDTHS, *MANY_CHUNKS, *EXTENDED], ids=str)
def test_every_layout(case, dtype):
    with launched() as names:
        check_dense(case, dtype)
    most_keys = math.prod(map(min, case.region, case.grid))
    assert layouts(names) == {layout(dtype, case.dim, True, most_keys, case.value_dim, case.biased)}


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale):
    check_dense(Case(1, (1, 6, 6), (1, 3, 3), 2, 64), torch.float32, scale)


def test_fewer_blocks_than_work():
    """What a launch does whose work exceeds the largest grid: blocks take several rows each."""
    with emulated(max_blocks=2):
        check_dense(Case(2, (2, 5, 6), (1, 3, 3), 3, 16), torch.bfloat16)


# The same draws in every run: among thousands of tiny float32 problems there are some whose reference happens to err
# by half a rounding step, and no kernel errs less than twice that.
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        st.integers(1, 2),
        st.tuples(*[st.integers(1, 6)] * 3),
        st.tuples(*[st.integers(1, 4)] * 3),
        st.integers(1, 4),
        st.one_of(st.integers(1, 80), st.integers(10, 32).map(lambda n: 8 * n)),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(case, dtype, seed):
    check_dense(case, dtype, seed=seed)


# Strides and alignment ------------------------------------------------------------------------------------------------


def in_nan(x: torch.Tensor, at: int, spare: int) -> torch.Tensor:
    """`x` as a view into a larger tensor of NaN, `at` places from its origin in every dimension."""
    memory = torch.full([size + at + spare for size in x.shape], NAN, dtype=x.dtype)
    view = memory[tuple(slice(at, at + size) for size in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("at", "spare", "vectors"),
    [(0, 8, True), (8, 8, True), (1, 7, False), (0, 1, False)],
    ids=["strided", "shifted", "unaligned pointer", "unaligned rows"],
)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 3, 3)], ids=str)
def test_views_into_nan(dtype, at, spare, vectors, region):
    case = Case(1, (2, 3, 4), region, 2, 24)
    inputs = [in_nan(x, at, spare) for x in case.inputs(dtype)]
    elements = 16 // dtype.itemsize
    assert vectors == all(x.data_ptr() % 16 == 0 and not any(s % elements for s in x.stride()[:-1]) for x in inputs)
    with launched() as names:
        assert_matches_reference(attention(region), dense_reference(region), inputs)
    assert layouts(names) == {layout(dtype, 24, vectors, math.prod(region))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_one_have_no_stride(dtype):
    """Whatever it is: it does not keep rows from being read in vectors."""
    case = Case(1, (1, 3, 3), (1, 3, 3), 1, 24)
    inputs = [
        x.as_strided(x.shape, [s if n > 1 else 3 for n, s in zip(x.shape, x.stride(), strict=True)])
        for x in case.inputs(dtype)
    ]
    with launched() as names:
        assert_matches_reference(attention(case.region), dense_reference(case.region), inputs)
    assert layouts(names) == {layout(dtype, 24, True, 9)}


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("which", range(3))
def test_one_unaligned_stride(axis, which):
    """Of one axis of one tensor: rows that are not aligned are read element by element."""
    case = Case(2, (2, 4, 4), (1, 2, 2), 2, 8)
    inputs = case.inputs(torch.float32)
    shape = inputs[which].shape
    others = [dim for dim in range(5) if dim != axis]
    strides = [1] * 6
    for place, dim in enumerate([*others, axis]):
        strides[dim] = 8 * 8**place + (dim == axis)  # no size is above 8, so that nothing overlaps
    view = torch.full([sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1], NAN).as_strided(
        shape, strides
    )
    inputs[which] = view.copy_(inputs[which])
    with launched() as names:
        assert_matches_reference(attention(case.region), dense_reference(case.region), inputs)
    assert {layout[0] for layout in layouts(names)} == {"1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_permuted_and_expanded(dtype):
    case = Case(2, (3, 5, 4), (2, 2, 3), 2, 16)
    query, key, value = case.inputs(dtype)
    key = key.permute(4, 1, 3, 2, 0, 5).contiguous().permute(4, 1, 3, 2, 0, 5)  # heads outermost, width before height
    value = value[:1, :, :1, :, :1].expand(value.shape)
    query = query.transpose(0, 4).contiguous().transpose(0, 4)
    assert_matches_reference(attention(case.region), dense_reference(case.region), [query, key, value])


def test_expanded_grad_output():
    case = Case(1, (1, 6, 6), (1, 3, 3), 2, 16)
    inputs = case.inputs(torch.float32)
    row = torch.randn(16)
    expanded, contiguous = row.expand(case.query_shape), row.repeat(*case.query_shape[:-1], 1)
    _, grads = gradients(attention(case.region), inputs, expanded)
    _, expected = gradients(attention(case.region), inputs, contiguous)
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad, wanted)


# Determinism, NaN and infinities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_the_order_of_threads_does_not_matter(case):
    inputs = case.inputs(torch.bfloat16)
    grad_output = torch.randn(case.query_shape).bfloat16()
    results = []
    for seed in range(20):
        with emulated(seed=seed):
            output, grads = gradients(attention(case.region), inputs, grad_output)
        results.append([output, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 3, 3)], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("special", [NAN, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_and_infinity(dtype, region, special, which):
    case = Case(1, (2, 6, 6), region, 1, 16)
    inputs = case.inputs(dtype)
    if which == 0:
        inputs[0][0, 0, 1, 1, 0, 5] = special
    else:
        for h, w in ((0, 0), (2, 4), (5, 2)):  # at the beginning, in the middle and at the end of a region
            inputs[which][0, 0, h, w, 0, 5] = special
    assert_matches_reference(attention(region), dense_reference(region), inputs)


@pytest.mark.parametrize("hidden", [1, 9, 12, 17, 18])
def test_scores_of_minus_infinity(hidden):
    """The first keys of a region get no weight at all: in one chunk, over several, and all of them, which gives NaN."""
    case = Case(1, (2, 3, 3), (2, 3, 3), 1, 128)
    query, key, value = case.inputs(torch.bfloat16)
    query[..., 0] = 1.0
    key[..., 0] = 0.0
    key.view(18, 128)[:hidden, 0] = -math.inf
    assert attention(case.region)(query, key, value).isnan().all() == (hidden == 18)
    assert_matches_reference(attention(case.region), dense_reference(case.region), [query, key, value])


# Packed videos --------------------------------------------------------------------------------------------------------


def packed_inputs(queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rows = (queries, keys, keys)
    return [torch.randn((n, heads, dim), generator=generator).to(dtype) for n in rows]


def tokens_and_regions(grids, region) -> tuple[int, int]:
    tokens = sum(math.prod(grid) for grid in grids)
    return tokens, sum(math.prod(-(-size // step) for size, step in zip(grid, region, strict=True)) for grid in grids)


PACKED = [
    [(2, 3, 4)],
    [(1, 5, 7), (0, 3, 3), (3, 2, 2), (2, 0, 5), (1, 1, 1)],
    [(0, 0, 0), (1, 4, 4)],
    [(4, 1, 3)] * 5,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grids", PACKED, ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 2, 2), (5, 1, 1), (9, 9, 9)], ids=str)
def test_packed(grids, region, dtype):
    keys, queries = tokens_and_regions(grids, region)
    inputs = packed_inputs(queries, keys, 2, 24, dtype)
    grid_thw = torch.tensor(grids, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    assert_matches_reference(
        attention(region, grid_thw=grid_thw), packed_reference(grid_thw, region), [in_nan(x, 0, 8) for x in inputs]
    )


# Videos that are longest along one axis, and regions that reach beyond them, or have many keys along one axis alone.
LONG = [[(12, 1, 2)], [(1, 12, 2), (2, 3, 1)], [(2, 1, 12), (1, 1, 1)]]


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "host"])
@pytest.mark.parametrize("grids", [PACKED[1], *LONG], ids=str)
@pytest.mark.parametrize("region", [(1, 3, 3), (2, 2, 2), (12, 1, 1), (1, 12, 1), (1, 1, 12), (20, 20, 20)], ids=str)
def test_packed_videos_and_regions_of_all_forms(region, grids, on_device):
    """Grids on the host are checked there and copied: no kernel looks for where videos begin."""
    keys, queries = tokens_and_regions(grids, region)
    inputs = packed_inputs(queries, keys, 2, 24, torch.float32)
    grid_thw = torch.tensor(grids)
    longest = grid_thw[grid_thw.prod(1) > 0].amax(0).tolist() if not on_device else [keys] * 3
    most_keys = min(keys, math.prod(map(min, region, longest)))
    with emulated(tensors_on_device=on_device), launched() as names:
        assert_matches_reference(attention(region, grid_thw=grid_thw), packed_reference(grid_thw, region), inputs)
    assert layouts(names) == {layout(torch.float32, 24, True, most_keys)}


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "host"])
@pytest.mark.parametrize("dims", [(24, 24), (8, 40), (7, 3), (300, 16)], ids=str)
def test_packed_biases_and_widths_of_values(dims, on_device):
    region = (1, 3, 3)
    keys, queries = tokens_and_regions(PACKED[1], region)
    query, key, value = packed_inputs(queries, keys, 2, max(dims), torch.float32)
    bias = random_bias((keys, 2), torch.Generator().manual_seed(1))
    inputs = [query[..., : dims[0]], key[..., : dims[0]], value[..., : dims[1]], bias]
    grid_thw = torch.tensor(PACKED[1])
    with emulated(tensors_on_device=on_device):
        assert_matches_reference(attention(region, grid_thw=grid_thw), packed_reference(grid_thw, region), inputs)


def test_packed_more_videos_than_threads():
    generator = torch.Generator().manual_seed(0)
    grid_thw = torch.randint(0, 3, (600, 3), generator=generator)
    region = (1, 2, 2)
    keys, queries = tokens_and_regions(grid_thw.tolist(), region)
    inputs = packed_inputs(queries, keys, 1, 8, torch.float32)
    assert_matches_reference(attention(region, grid_thw=grid_thw), packed_reference(grid_thw, region), inputs)


def test_packed_without_videos():
    grid_thw = torch.zeros((0, 3), dtype=torch.int64)
    output, grads = gradients(
        attention((1, 3, 3), grid_thw=grid_thw), packed_inputs(4, 5, 2, 8, torch.float32), torch.ones(4, 2, 8)
    )
    assert not any(x.any() for x in (output, *grads))


def lenient_reference(grid_thw: torch.Tensor, region):
    """What grids that do not add up mean: tokens that do not exist are passed over, queries without any get zeros."""

    def function(query, key, value, bias=None):
        bias = torch.zeros_like(key[..., 0]) if bias is None else bias
        keys_of_query: list[list[int]] = []
        first = 0
        for grid in grid_thw.clamp(min=0).tolist():
            t, h, w = (range(0, size, step) for size, step in zip(grid, region, strict=True))
            for corner in torch.cartesian_prod(*(torch.tensor(list(x), dtype=torch.long) for x in (t, h, w))).tolist():
                axes = [range(a, min(a + r, g)) for a, r, g in zip(corner, region, grid, strict=True)]
                numbers = [first + (t * grid[1] + h) * grid[2] + w for t in axes[0] for h in axes[1] for w in axes[2]]
                keys_of_query.append([number for number in numbers if number < len(key)])
            first += math.prod(grid)
        rows = []
        for i in range(len(query)):
            keys = keys_of_query[i] if i < len(keys_of_query) else []
            scores = torch.einsum("hd,khd->kh", query[i], key[keys]) / math.sqrt(query.shape[-1]) + bias[keys]
            rows.append(torch.einsum("kh,khd->hd", scores.softmax(0), value[keys]))
        return torch.stack(rows) + 0 * (query.sum() + key.sum() + value.sum() + bias.sum())

    return function


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dim", [8, 3])
@pytest.mark.parametrize(
    ("grids", "keys", "queries"),
    [
        pytest.param([(1, 3, 4), (2, 3, 3)], 22, 8, id="tokens end inside a region"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 12, 8, id="a video without tokens"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 40, 12, id="tokens and queries of no video"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 30, 5, id="fewer queries than regions"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 30, 1, id="one query"),
        pytest.param([(1, 3, 4), (-2, -3, 3), (1, -1, -1), (1, 2, 2)], 16, 6, id="negative sizes"),
        pytest.param([(3, 3, 3)], 5, 8, id="one video, cut short"),
        pytest.param([(1, 3, 4), (-2, 3, 3), (1, 2, 2)], 16, 5, id="a negative time"),
        pytest.param([(1, 7, 3), (1, 2, 2)], 25, 2, id="a tall video, fewer queries than regions"),
    ],
)
def test_packed_grids_that_do_not_add_up(grids, keys, queries, dim, biased):
    """Nothing reads the grids back from the GPU, so kernels must make do with any."""
    region = (1, 2, 2) if dim == 8 else (2, 3, 3)
    inputs = [in_nan(x, 0, 8) for x in packed_inputs(queries, keys, 2, dim, torch.float32)]
    if biased:  # and values that are more than a block's threads wide
        inputs[2:] = [in_nan(torch.randn(keys, 2, 100), 0, 8), in_nan(torch.randn(keys, 2), 0, 8)]
    grid_thw = torch.tensor(grids)
    grad_output = torch.randn(queries, 2, inputs[2].shape[-1])
    output, grads = gradients(attention(region, grid_thw=grid_thw), inputs, grad_output)
    expected, expected_grads = gradients(lenient_reference(grid_thw, region), inputs, grad_output)
    torch.testing.assert_close(output, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


HUGE = 2**62


@pytest.mark.parametrize(
    ("huge", "sensible"),
    [
        ((1, 1, HUGE), (1, 1, 7)),
        ((1, HUGE, 2), (1, 4, 2)),
        ((HUGE, 1, 1), (7, 1, 1)),
        ((HUGE, HUGE, HUGE), (1, 1, 7)),
        ((-HUGE, -HUGE, 3), (0, 0, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("region", [(1, 2, 2), (2**62, 2**62, 2**62)], ids=["small", "huge"])
def test_packed_grids_that_make_no_sense(huge, sensible, region):
    inputs = packed_inputs(9, 7, 1, 8, torch.float32)
    grad_output = torch.ones(9, 1, 8)
    results = [
        gradients(attention(region, grid_thw=torch.tensor([grid, (1, 2, 2)])), inputs, grad_output)
        for grid in (huge, sensible)
    ]
    (output, grads), (expected, expected_grads) = results
    assert torch.equal(output, expected)
    assert all(map(torch.equal, grads, expected_grads))


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dim", "vectors", "keys", "expected"),
    [
        (torch.bfloat16, 64, True, 9, "8 8 1 3 few"),
        (torch.bfloat16, 128, True, 9, "8 16 1 5 few"),
        (torch.bfloat16, 128, True, 45, "8 16 1 5 many"),
        (torch.float16, 256, True, 9, "8 32 1 9 few"),
        (torch.float32, 128, True, 9, "4 32 1 9 few"),
        (torch.float32, 256, True, 10, "4 32 2 9 many"),
        (torch.float16, 128, False, 2, "1 32 8 3 few"),
        (torch.float32, 130, True, 9, "1 32 8 3 many"),
        (torch.float32, 260, True, 9, "4 32 9 1 many extended"),
        (torch.bfloat16, 1152, True, 1, "8 32 5 1 many extended"),
        (torch.float32, 257, True, 9, "1 32 36 1 many extended"),
    ],
    ids=str,
)
def test_layout(dtype, dim, vectors, keys, expected):
    """Elements per load, lanes per row, loads per lane, keys per lane and chunk, and whether one chunk will do."""
    assert layout(dtype, dim, vectors, keys) == expected
    if "extended" not in expected:
        assert layout(dtype, dim, vectors, keys, biased=True) == f"{expected} extended"


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((24, 64), "8 8 1 3 few extended"),
        ((128, 8), "8 16 1 5 few extended"),
        ((8, 4), "1 32 8 3 many extended"),
        ((4, 8), "1 32 8 3 many extended"),
        ((8, 264), "8 32 5 1 many extended"),
        ((264, 257), "1 32 36 1 many extended"),
    ],
    ids=str,
)
def test_layout_of_values_of_another_width(dims, expected):
    assert layout(torch.bfloat16, dims[0], True, 9, dims[1]) == expected


@settings(deadline=None)
@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), max_size=50))
def test_divisor(divisor, numbers):
    numbers += [n for k in (1, 2, (2**31 - 1) // divisor) for n in (k * divisor - 1, k * divisor) if n >= 0]
    numbers += [2**31 - 1, 2**31]
    assert load().quotients(divisor, numbers) == [n // divisor for n in numbers]


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 3), (5, 3, 3), (7, 1, 13), (2, 1023, 512), (3, 700, 500)], ids=str)
def test_places(size):
    """Also those at the limit up to which they are calculated in float, and beyond it."""
    t, h, w = size
    numbers = (
        range(t * h * w) if t * h * w < 1000 else [*range(h * w - w - 5, h * w + 5), *range(t * h * w - 5, t * h * w)]
    )
    assert load().places(size, list(numbers)) == [[n // w // h, n // w % h, n % w] for n in numbers]
