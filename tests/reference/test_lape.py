"""Positions of patches: against the published vectors, and against loops that share no code. And bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from llava_st_ops.reference import (
    interpolate_rows,
    lape_add,
    lape_add_packed,
    neighboring_token_propagation,
    propagate_to_neighbors,
    resize_table,
)
from llava_st_ops.reference.lape import ALIGNMENTS
from tests.reference.lape_cases import (
    AXES,
    LOW_PRECISION,
    NAN,
    anchor_of,
    half_an_ulp,
    load_golden,
    random_table,
    resize_matrix,
)

# Resizing and interpolation of a table


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.integers(0, 100), st.integers(0, 3), st.sampled_from(ALIGNMENTS))
def test_resize_against_exact_fractions(count, size, channels, alignment):
    table = random_table(count, channels, count).requires_grad_()
    matrix = torch.from_numpy(resize_matrix(size, count, alignment))
    resized = resize_table(table, size, alignment)
    torch.testing.assert_close(resized, matrix @ table, rtol=0, atol=1e-13)
    grad = random_table(size, channels, 1)
    (found,) = torch.autograd.grad(resized, table, grad)
    torch.testing.assert_close(found, matrix.T @ grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "size"), [(100, 27), (100, 1), (1, 5), (3, 100), (7, 7), (100, 64), (100, 200)])
@pytest.mark.parametrize("alignment", ["ends", "centers"])
def test_resize_against_interpolate(count, size, alignment):
    table = random_table(count, 3, 0)
    expected = interpolate(table.T[None], size, mode="linear", align_corners=alignment == "ends")[0].T
    torch.testing.assert_close(resize_table(table, size, alignment), expected, rtol=0, atol=1e-12)
    if alignment == "centers":  # torch has float32 source positions for a float32 table, ours are float64
        actual = resize_table(table.float(), size, "centers").double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_rows_that_sit_at_an_anchor_are_its_row_to_the_bit(alignment):
    table = random_table(100, 2, 0)
    for size in range(1, 200):
        anchors = [anchor_of(i, size, 100, alignment) for i in range(size)]
        hits = [i for i, anchor in enumerate(anchors) if anchor.denominator == 1]
        rows = resize_table(table, size, alignment)[hits]
        assert torch.equal(rows, table[[int(anchors[i]) for i in hits]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("alignment", ["ends", "centers"])
@pytest.mark.parametrize("count", [1, 2, 100, 729])
def test_a_table_of_the_size_wanted_is_taken_as_it_is(dtype, alignment, count):
    table = random_table(count, 4, 0, dtype)
    table[0, :3] = torch.tensor([-0.0, torch.inf, NAN])
    resized = resize_table(table, count, alignment)
    assert resized.dtype == dtype
    assert torch.equal(resized.nan_to_num(7), table.nan_to_num(7))
    assert resized[0, 0].signbit()


def test_a_single_row_is_the_first_anchor_if_aligned_and_the_middle_if_not():
    table = torch.tensor([[1.0], [2.0], [6.0], [9.0]])
    assert resize_table(table, 1, "ends").tolist() == [[1.0]]
    assert resize_table(table, 1, "centers").tolist() == [[4.0]]


def test_interpolation_at_each_anchor_gives_its_row():
    """Also where 99 * (k / 99) is not exactly k, in float64 and in float32."""
    inexact = [k for k in range(100) if 99 * (k / 99) != k]
    assert inexact
    positions = torch.arange(100, dtype=torch.float64) / 99
    table = random_table(100, 3, 0)
    torch.testing.assert_close(interpolate_rows(table, positions), table, rtol=0, atol=1e-12)
    exact = [k for k in range(100) if k not in inexact]
    assert torch.equal(interpolate_rows(table, positions)[exact], table[exact])
    torch.testing.assert_close(interpolate_rows(table.float(), positions), table.float(), rtol=0, atol=1e-12)


def test_interpolation_by_hand():
    table = torch.tensor([[0.0, 4.0], [2.0, 0.0], [8.0, 8.0]])
    positions = torch.tensor([0.25, 0.5, 0.875, -0.1, 1.2, torch.inf, -torch.inf, -0.0], dtype=torch.float64)
    expected = [[1, 2], [2, 0], [6.5, 6], [0, 4], [8, 8], [8, 8], [0, 4], [0, 4]]
    assert interpolate_rows(table, positions).tolist() == expected
    assert interpolate_rows(table[:1], positions).tolist() == [[0, 4]] * 8  # a table of one row
    assert interpolate_rows(table, positions[:0]).shape == (0, 2)
    infinite = torch.tensor([[1.0], [torch.inf]])
    assert interpolate_rows(infinite, positions[[3, 0, 4]]).flatten().tolist() == [1, torch.inf, torch.inf]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_is_interpolated_and_resized_with_one_rounding(dtype):
    table = random_table(100, 64, 0, dtype)
    positions = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = interpolate_rows(table.double(), positions)
    assert ((interpolate_rows(table, positions).double() - exact).abs() <= half_an_ulp(exact, dtype)).all()
    exact = resize_table(table.double(), 27, "centers")
    assert ((resize_table(table, 27, "centers").double() - exact).abs() <= half_an_ulp(exact, dtype)).all()


def test_positions_are_data_and_get_no_gradient():
    positions = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert not interpolate_rows(random_table(4, 2, 0), positions).requires_grad


# Addition to features


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("name", ["lape_inject_video", "lape_inject_image"])
def test_golden_injection(name, compat):
    tensors, config = load_golden(name)
    names = [f"{axis}_{kind}" for axis in AXES for kind in ("input", "output")]
    raw = {key: tensors[key].requires_grad_() for key in names}
    used = {key: neighboring_token_propagation(table, compat=compat) for key, table in raw.items()}
    tables = [(used[f"{axis}_input"] + used[f"{axis}_output"]) / 2 for axis in AXES]
    features = tensors["features"].unflatten(1, (config["grid"], config["grid"]))[None].requires_grad_()
    injected = lape_add(features, *tables)
    injected.backward(tensors["cotangent"].view_as(features))
    torch.testing.assert_close(injected, tensors["injected"].view_as(injected), rtol=0, atol=5e-5)
    assert torch.equal(features.grad.view_as(tensors["cotangent"]), tensors["cotangent"])
    for key in names:
        bound = 1e-5 * tensors[f"grad_{key}"].abs().max().item()
        torch.testing.assert_close(raw[key].grad, tensors[f"grad_{key}"], rtol=0, atol=bound)
    # With torch's own source positions, which are those of the published code, only last bits differ.
    as_torch = [interpolate(t.T[None], config["grid"], mode="linear")[0].T for t in tables[1:]]
    injected = lape_add(features, tables[0], *as_torch)
    torch.testing.assert_close(injected, tensors["injected"].view_as(injected), rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.tuples(*[st.integers(0, 5)] * 3),
    st.tuples(*[st.integers(1, 7)] * 3),
    st.integers(0, 3),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
)
def test_addition_and_its_gradients_against_loops(batch, grid, counts, channels, dtype, text_aligned):
    tables = [random_table(count, channels, i, dtype).requires_grad_() for i, count in enumerate(counts)]
    shape = (batch, *grid, channels)
    features, grad = (random_table(math.prod(shape), 1, seed).to(dtype).view(shape) for seed in (5, 7))
    features.requires_grad_()
    output = lape_add(features, *tables, text_aligned=text_aligned)
    found = torch.autograd.grad(output, [features, *tables], grad)
    spatial = "text" if text_aligned else "centers"
    matrices = [resize_matrix(*args) for args in zip(grid, counts, ("ends", spatial, spatial), strict=True)]
    expected = features.detach().double().numpy().copy()
    expected_grads = [np.zeros(table.shape) for table in tables]
    for b, *place in np.ndindex(batch, *grid):
        for number, (matrix, at) in enumerate(zip(matrices, place, strict=True)):
            expected[(b, *place)] += matrix[at] @ tables[number].detach().double().numpy()
            expected_grads[number] += matrix[at][:, None] * grad[(b, *place)].double().numpy()
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5, "check_dtype": False}
    assert all(tensor.dtype == dtype for tensor in (output, *found))
    torch.testing.assert_close(output, torch.from_numpy(expected), **tolerance)
    assert torch.equal(found[0], grad)
    for table_grad, wanted in zip(found[1:], expected_grads, strict=True):
        torch.testing.assert_close(table_grad, torch.from_numpy(wanted), **tolerance)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_one_rounding_or_one_after_each_addition(dtype, table_dtype):
    features = random_table(6 * 5 * 4, 32, 0, dtype).view(1, 6, 5, 4, 32)
    t, h, w = (random_table(count, 32, count, table_dtype) for count in (10, 7, 13))
    exact = lape_add(features.double(), t, h, w)
    once = lape_add(features, t, h, w)
    assert once.dtype == dtype
    assert ((once.double() - exact).abs() <= half_an_ulp(exact, dtype)).all()
    often = lape_add(features, t, h, w, round_every_addition=True)
    assert often.dtype == dtype
    assert ((often.double() - exact).abs() > 1.2 * half_an_ulp(exact, dtype)).any()
    h, w = (resize_table(x.float(), size, "centers").to(dtype) for x, size in ((h, 5), (w, 4)))
    t = resize_table(t.float(), 6, "ends").to(dtype)
    for f, r, c in np.ndindex(6, 5, 4):
        assert torch.equal(often[0, f, r, c], ((features[0, f, r, c] + h[r]) + w[c]) + t[f])
    t, h, w, single = (x.float() + 1e-4 for x in (t[:, None, None], h[:, None], w, features))
    expected = ((single + h) + w) + t  # in float32 both are the same
    for every in (False, True):
        actual = lape_add(single, t[:, 0, 0], h[:, 0], w, round_every_addition=every)
        assert torch.equal(actual, expected)


def test_a_single_frame_takes_temporal_row_0_and_frames_their_text_coordinate():
    t, flat = random_table(100, 2, 0), torch.zeros(1, 2, dtype=torch.float64)
    features = torch.zeros(1, 1, 2, 3, 2, dtype=torch.float64)
    assert torch.equal(lape_add(features, t, flat, flat), t[0].expand(1, 1, 2, 3, 2))
    frames = lape_add(features.expand(1, 37, 2, 3, 2), t, flat, flat)[0, :, 1, 2]
    text = interpolate_rows(t, torch.arange(37, dtype=torch.float64) / 36)
    torch.testing.assert_close(frames, text, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [False, True])
def test_packed_videos_are_added_to_one_by_one(every):
    tables = [random_table(count, 8, count).requires_grad_() for count in (9, 5, 6)]
    grids = torch.tensor([[3, 4, 5], [1, 2, 2], [0, 3, 3], [9, 1, 6]])
    features = random_table(int(grids.prod(1).sum()), 8, 0, torch.bfloat16).requires_grad_()
    packed = lape_add_packed(features, *tables, grids, round_every_addition=every)
    first, expected = 0, []
    for t, h, w in grids.tolist():
        video = features[first : first + t * h * w].view(1, t, h, w, 8)
        expected.append(lape_add(video, *tables, round_every_addition=every).view(-1, 8))
        first += t * h * w
    assert torch.equal(packed, torch.cat(expected))
    grad = random_table(len(packed), 8, 1, torch.bfloat16)
    found = torch.autograd.grad(packed, [features, *tables], grad)
    for actual, wanted in zip(found, torch.autograd.grad(torch.cat(expected), [features, *tables], grad), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_no_packed_videos():
    features = torch.zeros(0, 8, requires_grad=True)
    empty = lape_add_packed(features, *[random_table(3, 8, 0)] * 3, torch.zeros(0, 3, dtype=torch.int32))
    assert empty.shape == (0, 8)
    assert empty.requires_grad


# Differentiation, and bad arguments


def test_gradcheck():
    t, h, w = (random_table(count, 2, count).requires_grad_() for count in (4, 3, 5))
    features = random_table(12, 2, 0).view(1, 2, 3, 2, 2).requires_grad_()
    checks = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(lape_add, (features, t, h, w), **checks)
    grids = torch.tensor([[2, 1, 3], [1, 3, 2]])
    packed = features.detach().view(12, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: lape_add_packed(*x, grids), (packed, t, h, w), **checks)


X, TABLE, GRIDS = torch.zeros(6, 2), torch.zeros(3, 2), torch.tensor([[1, 2, 3]])
TABLES, NEGATIVE = (TABLE, TABLE, TABLE), torch.tensor([[1, 2, 3], [-1, -1, 0]])
NEITHER = torch.tensor([0, NAN], dtype=torch.float64)
BAD_OTHERS = [
    (resize_table, (TABLE[0], 2, "ends"), {}, r"table must have shape \[n, C\], got \[2\]"),
    (resize_table, (TABLE[:0], 2, "ends"), {}, r"table must have at least one row, got \[0, 2\]"),
    (resize_table, (TABLE, -1, "ends"), {}, "size must not be negative, got -1"),
    (resize_table, (TABLE, 2, "middle"), {}, "alignment must be one of ends, centers, text, got 'middle'"),
    (interpolate_rows, (TABLE[:0], X[:, 0].double()), {}, r"table must have at least one row, got \[0, 2\]"),
    (interpolate_rows, (TABLE, X.double()), {}, r"positions must have shape \[P\], got \[6, 2\]"),
    (interpolate_rows, (TABLE, X[:, 0]), {}, "positions must be float64, got torch.float32"),
    (interpolate_rows, (TABLE, NEITHER), {}, r"positions\[1\] must be a number, got nan"),
    (lape_add, (X, *TABLES), {}, r"features must have shape \[B, T, H, W, C\], got \[6, 2\]"),
    (lape_add, (X.view(1, 1, 2, 3, 2).int(), *TABLES), {}, "features must be float16 .* got torch.int32"),
    (lape_add, (X.view(1, 1, 2, 3, 2), TABLE, X.T, TABLE), {}, r"height must have shape \[n, 2\], got \[2, 6\]"),
    (lape_add_packed, (X[0], *TABLES, GRIDS), {}, r"features must have shape \[tokens, C\], got \[2\]"),
    (lape_add_packed, (X, X, X, X[:0], GRIDS[:0]), {}, r"width must have at least one row, got \[0, 2\]"),
    (lape_add_packed, (X, *TABLES, GRIDS[0]), {}, r"grid_thw must have shape \[videos, 3\], got \[3\]"),
    (lape_add_packed, (X, *TABLES, GRIDS.float()), {}, "grid_thw must be int32 or int64, got torch.float32"),
    (lape_add_packed, (X, *TABLES, 2 * GRIDS), {}, "grid_thw must add up to the 6 tokens of features, got 48"),
    (lape_add_packed, (X, *TABLES, NEGATIVE), {}, r"grid_thw must not be negative, got \[-1, -1, 0\] for video 1"),
    (neighboring_token_propagation, (TABLE[0],), {}, r"table must have shape \[n, C\], got \[2\]"),
    (neighboring_token_propagation, (TABLE.int(),), {}, "table must be float16 .* got torch.int32"),
    (neighboring_token_propagation, (X,), {"compat": "old"}, """compat must be "paper" or "released", got 'old'"""),
    (propagate_to_neighbors, (TABLE[0],), {}, r"x must have shape \[n, C\], got \[2\]"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "message"), BAD_OTHERS)
def test_bad_arguments(function, arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=f"^{function.__name__}: {message}$"):
        function(*arguments, **options)
