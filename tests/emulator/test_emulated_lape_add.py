"""What is special about the CUDA kernels of lape_add: layouts, tiles, slices, grids that do not add up.

They run in the emulator, as raw ops. The tests of all backends (tests/ops) run there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_st_ops import reference
from tests.emulator.backend import DTYPES, emulated, launched
from tests.emulator.emulated_lape import INF, NAN, TABLES, elements, in_nan, random, random_tables, raw, wide
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned_results", "ops")


@dataclass(frozen=True)
class Case:
    """A dense call: samples, grid, anchors of the three tables, channels."""

    samples: int
    grid: tuple[int, int, int]
    anchors: tuple[int, int, int]
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.samples, *self.grid, self.channels)

    def inputs(self, dtype: torch.dtype, tables: torch.dtype | None = None, seed: int = 0) -> list[torch.Tensor]:
        features = random(*self.shape, seed=seed, dtype=dtype)
        return [features, *random_tables(self.anchors, self.channels, tables or dtype, seed)]


def table_gradients(function, tables, grad_output) -> tuple[torch.Tensor, ...]:
    tables = [table.detach().requires_grad_() for table in tables]
    return torch.autograd.grad(function(*tables), tables, grad_output)


def check_forward(inputs, text: bool = False, rounding: bool = False) -> torch.Tensor:
    result = raw().lape_add(*inputs, text, rounding)
    assert result.is_contiguous()
    exact = reference.lape_add(*wide(*inputs), text)
    assert_accurate(result, exact, reference.lape_add(*inputs, text, rounding))
    return result


def check_backward(grad_output, tables, text: bool = False) -> list[torch.Tensor]:
    grads = raw().lape_add_backward(grad_output, *tables, text)
    zeros = torch.zeros(grad_output.shape, dtype=grad_output.dtype)
    exact = table_gradients(
        lambda *t: reference.lape_add(zeros.double(), *t, text), wide(*tables), grad_output.double()
    )
    same = table_gradients(lambda *t: reference.lape_add(zeros, *t, text), tables, grad_output)
    for name, grad, wanted, dtype_grad in zip(TABLES, grads, exact, same, strict=True):
        assert grad.is_contiguous()
        assert_accurate(grad, wanted, dtype_grad, name)
    return grads


def check(case: Case, dtype: torch.dtype, tables: torch.dtype | None = None, text: bool = False, seed: int = 0) -> None:
    inputs = case.inputs(dtype, tables, seed)
    check_forward(inputs, text)
    check_backward(random(*case.shape, seed=seed + 7, dtype=dtype), inputs[1:], text)


# More of everything than one tile has, and less; tables that shrink, grow, and stay.
CASES = [
    Case(1, (3, 4, 5), (4, 3, 5), 16),
    Case(2, (5, 3, 7), (3, 8, 7), 8),
    Case(3, (1, 10, 9), (2, 1, 30), 4),
    Case(1, (9, 1, 1), (1, 2, 3), 24),
    Case(1, (1, 1, 20), (5, 5, 5), 3),
    Case(2, (17, 19, 2), (4, 7, 2), 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [False, True], ids=["centers", "text"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(case, dtype, text):
    check(case, dtype, text=text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", DTYPES, ids=str)
def test_tables_of_another_dtype(dtype, tables):
    check(CASES[0], dtype, tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tables", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 3])
def test_every_addition_rounds(dtype, tables, channels):
    inputs = Case(1, (3, 4, 5), (4, 3, 5), channels).inputs(dtype, tables)
    result = check_forward(inputs, rounding=True)
    assert not torch.equal(result, raw().lape_add(*inputs))
    assert (result != reference.lape_add(*inputs, round_every_addition=True)).float().mean() < 0.01


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        st.integers(1, 3),
        st.tuples(*[st.integers(1, 10)] * 3),
        st.tuples(*[st.integers(1, 12)] * 3),
        st.sampled_from([1, 2, 4, 6, 8, 16]),
    ),
    dtype=st.sampled_from(DTYPES),
    tables=st.sampled_from(DTYPES),
    text=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(case, dtype, tables, text, seed):
    check(case, dtype, tables, text, seed)


@pytest.mark.parametrize("case", [Case(1, (4, 24, 9), (4, 24, 3), 64), Case(2, (9, 7, 20), (3, 7, 20), 32)], ids=str)
def test_tall_tiles(case):
    """Where there are threads enough, as is soon the case with a single block, tiles have several rows."""
    with emulated(max_blocks=1):
        check(case, torch.float32)


def test_fewer_blocks_than_work():
    """What a launch does whose work exceeds the largest grid."""
    with emulated(max_blocks=2):
        for case in CASES[:2]:
            check(case, torch.bfloat16)


@pytest.mark.parametrize("axis", range(4))
def test_no_tokens(axis):
    shape = [2, 3, 4, 5, 8]
    shape[axis] = 0
    tables = random_tables((2, 3, 4), 8, torch.bfloat16)
    features = torch.empty(shape, dtype=torch.bfloat16)
    assert raw().lape_add(features, *tables).shape == torch.Size(shape)
    raw().lape_add_(features, *tables)
    for grad, table in zip(raw().lape_add_backward(features, *tables), tables, strict=True):
        assert torch.equal(grad, torch.zeros_like(table))


def test_no_channels():
    tables = random_tables((2, 3, 4), 0, torch.float32)
    features = torch.empty(1, 2, 3, 4, 0)
    assert raw().lape_add(features, *tables).shape == features.shape
    assert [grad.shape for grad in raw().lape_add_backward(features, *tables)] == [table.shape for table in tables]


# Strides and alignment


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("at", "spare", "vectors"),
    [(0, 8, True), (8, 8, True), (1, 7, False), (0, 1, False)],
    ids=["strided", "shifted", "unaligned pointer", "unaligned rows"],
)
def test_views_into_nan(dtype, at, spare, vectors):
    """Unaligned tables do not matter: they are brought to float first."""
    inputs = [in_nan(x, at, spare) for x in Case(1, (3, 4, 5), (4, 3, 5), 24).inputs(dtype)]
    per_load = 16 // dtype.itemsize
    assert vectors == all(x.data_ptr() % 16 == 0 and not any(s % per_load for s in x.stride()[:-1]) for x in inputs)
    with launched() as names:
        check_forward(inputs)
        check_backward(inputs[0], inputs[1:])
        check_forward([inputs[0].contiguous(), *(in_nan(x, 1, 2) for x in inputs[1:])])
    assert elements(names, "lape_add_forward") == ({per_load} if vectors else {1, per_load})
    assert elements(names, "lape_add_sum_tiles") == {per_load // 2 if vectors else 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 4, 8, 12])
def test_channels_make_whole_packets(channels, dtype):
    """Sixteen bytes in the forward pass, eight in the backward pass, or single elements."""
    with launched() as names:
        check(Case(1, (2, 3, 2), (2, 3, 4), channels), dtype)
    for kernel, nbytes in (("lape_add_forward", 16), ("lape_add_sum_tiles", 8)):
        per_load = nbytes // dtype.itemsize
        assert elements(names, kernel) == {per_load if channels % per_load == 0 else 1}
    assert elements(names, "lape_add_finish") == {4 if channels % 4 == 0 else 1}


@pytest.mark.parametrize("axis", range(4))
def test_one_unaligned_stride(axis):
    case = Case(2, (2, 3, 2), (2, 2, 2), 8)
    others = [dim for dim in range(4) if dim != axis]
    strides = [1] * 5
    for place, dim in enumerate([*others, axis]):
        strides[dim] = 8 * 8**place + (dim == axis)  # no size is above 8, so that nothing overlaps
    memory = torch.full([sum((n - 1) * s for n, s in zip(case.shape, strides, strict=True)) + 1], NAN)
    inputs = case.inputs(torch.float32)
    inputs[0] = memory.as_strided(case.shape, strides).copy_(inputs[0])
    with launched() as names:
        check_forward(inputs)
        check_backward(inputs[0][:1], inputs[1:])
    assert elements(names, "lape_add_forward") == {1}
    assert elements(names, "lape_add_sum_tiles") == {1 if axis > 0 else 2}


def test_frames_that_are_not_equally_far_apart():
    """Those of another sample follow at another distance: in the backward pass they are copied, which aligns them."""
    features, *tables = Case(2, (3, 4, 5), (4, 3, 5), 8).inputs(torch.bfloat16)
    for view in (in_nan(features, 0, 1), in_nan(features, 0, 8), features.flip(0)[:, :2]):
        with launched() as names:
            check_forward([view, *tables])
            check_backward(view, tables)
        assert elements(names, "lape_add_sum_tiles") == {4}


def test_sizes_of_one_have_no_stride():
    features, *tables = Case(1, (1, 3, 1), (2, 2, 2), 8).inputs(torch.bfloat16)
    features = features.as_strided(features.shape, [3, 5, 8, 7, 1])
    with launched() as names:
        check_forward([features, *tables])
        check_backward(features, tables)
    assert elements(names, "lape_add_forward") == {8}
    assert elements(names, "lape_add_sum_tiles") == {4}


@pytest.mark.parametrize("dims", [(1, 0, 2, 3, 4), (0, 3, 2, 1, 4), (4, 1, 2, 3, 0), (0, 1, 4, 3, 2)], ids=str)
def test_permuted(dims):
    """Samples inside frames, columns before rows, and rows that are not contiguous."""
    features, *tables = Case(2, (3, 4, 5), (4, 3, 5), 8).inputs(torch.bfloat16)
    back = [dims.index(dim) for dim in range(5)]
    features = features.permute(dims).contiguous().permute(back)
    check_forward([features, *tables])
    check_backward(features, tables)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3, 4), (0,), (1,), (0, 1), (2, 3), (0, 3)], ids=str)
def test_expanded(axes):
    """As the gradient of a sum is."""
    case = Case(2, (3, 4, 5), (4, 3, 5), 8)
    one = random(*(1 if axis in axes else size for axis, size in enumerate(case.shape)))
    tables = random_tables(case.anchors, 8, torch.float32)
    check_forward([one.expand(case.shape), *tables])
    check_backward(one.expand(case.shape), tables)


# In place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("view", ["contiguous", "strided", "unaligned", "channels apart"])
def test_in_place(view, rounding, dtype):
    features, *tables = Case(2, (3, 4, 5), (4, 3, 5), 16).inputs(dtype)
    expected = raw().lape_add(features, *tables, False, rounding)
    if view == "strided":
        features = in_nan(features, 0, 8)
    elif view == "unaligned":
        features = in_nan(features, 1, 0)
    elif view == "channels apart":
        features = torch.stack([features, torch.full_like(features, NAN)], -1)[..., 0]
    around = features._base.clone() if features._base is not None else None
    with launched() as names:
        assert raw().lape_add_(features, *tables, False, rounding) is None
    assert torch.equal(features, expected)
    assert elements(names, "lape_add_forward") == {1 if view == "unaligned" else 16 // dtype.itemsize}
    if around is not None:
        assert features._base.isnan().sum() == around.isnan().sum()


# Exactness


def test_infinite_neighbours_do_not_count():
    """At an anchor its row counts alone, to the bit, and an infinite neighbour does not make it NaN."""
    features = torch.zeros(1, 3, 3, 3, 8)
    tables = [torch.ones(5, 8) for _ in TABLES]
    for table in tables:
        table[1::2] = INF  # between the anchors of three patches with aligned ends
    assert torch.equal(
        raw().lape_add(features[:, :, :1, :1], tables[0], *[torch.zeros(1, 8)] * 2).flatten(), torch.ones(24)
    )
    same = [torch.tensor([[1.0], [INF], [2.0]]).expand(3, 8)] * 3
    result = raw().lape_add(features, *same)
    assert torch.equal(result, reference.lape_add(features, *same))
    assert not result.isnan().any()


@pytest.mark.parametrize("special", [NAN, INF], ids=str)
def test_special_gradients(special):
    """They reach the anchors around their token, and no other."""
    case = Case(1, (9, 3, 10), (9, 3, 10), 4)
    grad_output = random(*case.shape)
    grad_output[0, 8, 1, 9, 2] = special
    check_backward(grad_output, random_tables(case.anchors, 4, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_threads_does_not_matter(dtype):
    case = CASES[1]
    inputs = case.inputs(dtype)
    grids = torch.tensor([[2, 2, 3], [1, 5, 4], [3, 4, 2]])
    packed = random(int(grids.prod(1).sum()), 8, dtype=dtype)
    results = []
    for seed in range(6):
        with emulated(seed=seed):
            results.append(
                [
                    raw().lape_add(*inputs),
                    *raw().lape_add_backward(inputs[0], *inputs[1:]),
                    *raw().lape_add_packed_backward(packed, *inputs[1:], grids),
                ]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Packed


def check_packed(grids, inputs, text: bool = False, rounding: bool = False, on_device: bool = True) -> None:
    features, *tables = inputs
    with emulated(tensors_on_device=on_device):
        result = raw().lape_add_packed(*inputs, grids, text, rounding)
        grads = raw().lape_add_packed_backward(features, *tables, grids, text)
    exact = reference.lape_add_packed(*wide(*inputs), grids, text)
    assert_accurate(result, exact, reference.lape_add_packed(*inputs, grids, text, rounding))
    zeros = torch.zeros_like(features)
    wanted = table_gradients(
        lambda *t: reference.lape_add_packed(zeros.double(), *t, grids, text), wide(*tables), features.double()
    )
    same = table_gradients(lambda *t: reference.lape_add_packed(zeros, *t, grids, text), tables, features)
    for name, grad, exact_grad, dtype_grad in zip(TABLES, grads, wanted, same, strict=True):
        assert_accurate(grad, exact_grad, dtype_grad, name)


def packed_inputs(grids, anchors, channels, dtype, tables=None):
    tokens = sum(math.prod(grid) for grid in grids)
    return [random(tokens, channels, dtype=dtype), *random_tables(anchors, channels, tables or dtype)]


GRIDS = [
    [(2, 3, 4)],
    [(1, 5, 7), (0, 3, 3), (3, 2, 2), (2, 0, 5), (1, 1, 1)],
    [(0, 0, 0), (9, 2, 3), (1, 20, 2), (2, 1, 17)],
    [(1, 1, 1)] * 7,
]


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "host"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_packed(grids, dtype, on_device):
    inputs = packed_inputs(grids, (4, 7, 3), 8, dtype, torch.float32)
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    with launched() as names:
        for text in (False, True):
            check_packed(torch.tensor(grids, dtype=integers), inputs, text, on_device=on_device)
    assert elements(names, "lape_add_forward") == {16 // dtype.itemsize}
    assert elements(names, "lape_add_sum_slices") == {8 // dtype.itemsize}
    assert bool(elements(names, "lape_add_keep_rest")) == on_device


@pytest.mark.parametrize("channels", [3, 8])
def test_packed_views(channels):
    """Rows that are unaligned, too far apart, not contiguous, and one for all."""
    grids = torch.tensor(GRIDS[1])
    features, *tables = packed_inputs(GRIDS[1], (4, 7, 3), channels, torch.bfloat16)
    for view in (
        in_nan(features, 0, 8),
        in_nan(features, 1, 0),
        features.t().contiguous().t(),
        features[:1].expand(features.shape),
    ):
        check_packed(grids, [view, *tables])


def test_packed_rounding():
    inputs = packed_inputs(GRIDS[2], (4, 7, 3), 8, torch.bfloat16)
    check_packed(torch.tensor(GRIDS[2]), inputs, rounding=True)


def test_packed_fewer_blocks_than_work():
    with emulated(max_blocks=1):
        check_packed(torch.tensor(GRIDS[1]), packed_inputs(GRIDS[1], (4, 7, 3), 136, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_several_slices(dtype):
    """There are 128 tokens for each; tiles do not fit evenly."""
    grids = [(3, 18, 9), (1, 5, 5), (8, 8, 8), (1, 17, 1), (9, 1, 9)]
    check_packed(torch.tensor(grids), packed_inputs(grids, (3, 20, 9), 8, dtype))


def test_packed_more_videos_than_threads():
    grids = torch.randint(0, 3, (300, 3), generator=torch.Generator().manual_seed(0))
    check_packed(grids, packed_inputs(grids.tolist(), (2, 3, 4), 4, torch.float32))


@pytest.mark.parametrize("tokens", [0, 5])
def test_packed_without_videos(tokens):
    grids = torch.zeros((0, 3), dtype=torch.int64)
    features, *tables = [random(tokens, 8), *random_tables((2, 3, 4), 8, torch.float32)]
    assert torch.equal(raw().lape_add_packed(features, *tables, grids), features)
    for grad in raw().lape_add_packed_backward(features, *tables, grids):
        assert torch.equal(grad, torch.zeros_like(grad))


def lenient_packed(features, tables, grids):
    """What grids that do not add up mean: they are cut down to what all tokens can fill (packed_grids.cuh), videos end
    where tokens end, and tokens of no video stay as they are."""
    rows, first = [features[:0]], 0
    for t, h, w in grids:
        if first >= len(features) or min(t, h, w) <= 0:
            continue
        w = min(w, len(features))
        h = min(h, -(-len(features) // w))
        grid = (min(t, -(-len(features) // (h * w))), h, w)
        here = features[first : first + math.prod(grid)]
        missing = math.prod(grid) - len(here)
        video = torch.cat([here, torch.zeros(missing, features.shape[1], dtype=features.dtype)])
        video = reference.lape_add(video.unflatten(0, (1, *grid)), *tables).flatten(0, 3)
        rows.append(video[: len(here)])
        first += math.prod(grid)
    return torch.cat([*rows, features[first:]])


@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("grids", "tokens"),
    [
        pytest.param([(1, 3, 4), (2, 3, 3)], 22, id="tokens end inside a video"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 12, id="a video without tokens"),
        pytest.param([(1, 3, 4), (2, 3, 3)], 40, id="tokens of no video"),
        pytest.param([(1, 3, 4), (-2, -3, 3), (1, -1, -1), (1, 2, 2)], 16, id="negative sizes"),
        pytest.param([(3, 3, 3)], 5, id="one video, cut short"),
        pytest.param([(20, 12, 11)], 1500, id="many tiles, some cut short"),
        pytest.param([(3, 3, 3)] * 5, 1, id="one token"),
    ],
)
def test_packed_grids_that_do_not_add_up(grids, tokens, dtype, channels):
    """Nothing reads the grids back from the GPU, so kernels must make do with any."""
    features = in_nan(random(tokens, channels, dtype=dtype), 0, 8)
    tables = random_tables((2, 5, 3), channels, dtype)
    thw = torch.tensor(grids)
    assert_accurate(
        raw().lape_add_packed(features, *tables, thw),
        lenient_packed(features.double(), wide(*tables), grids),
        lenient_packed(features, tables, grids),
    )
    grads = raw().lape_add_packed_backward(features, *tables, thw)
    zeros = torch.zeros_like(features)
    exact = table_gradients(lambda *t: lenient_packed(zeros.double(), t, grids), wide(*tables), features.double())
    same = table_gradients(lambda *t: lenient_packed(zeros, t, grids), tables, features)
    for name, grad, wanted, dtype_grad in zip(TABLES, grads, exact, same, strict=True):
        assert_accurate(grad, wanted, dtype_grad, name)


HUGE = 2**62


@pytest.mark.parametrize(
    ("huge", "cut"),
    [
        ((1, 1, HUGE), (1, 1, 7)),
        ((1, HUGE, 2), (1, 4, 2)),
        ((HUGE, 1, 1), (7, 1, 1)),
        ((HUGE, HUGE, HUGE), (1, 1, 7)),
        ((-HUGE, -HUGE, 3), (0, 0, 0)),
    ],
    ids=str,
)
def test_packed_grids_that_make_no_sense(huge, cut):
    """They are cut down to what tokens can fill, which changes where patches lie, but nothing is out of bounds."""
    features, *tables = [random(7, 8), *random_tables((2, 5, 3), 8, torch.float32)]
    results = [
        [
            raw().lape_add_packed(features, *tables, torch.tensor([grid, (1, 2, 2)])),
            *raw().lape_add_packed_backward(features, *tables, torch.tensor([grid, (1, 2, 2)])),
        ]
        for grid in (huge, cut)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
