"""The Triton kernels of lape_add, in place and packed too, and of their gradients, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

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

NAMES = ("output", "gradient of temporal", "gradient of height", "gradient of width")
INF, NAN = math.inf, math.nan
pytestmark = ignores_numpy_warnings


@pytest.fixture
def addition(launchers):
    return launchers("addition")


def random_tables(counts, channels, dtype, device):
    return [random_like((count, channels), dtype, device, seed) for seed, count in enumerate(counts, 2)]


def check(ops, features, tables, *grid_thw, text_aligned=False, rounded=False, grad_output=None, by=None):
    """Output and gradients, dense or packed. `by` has the forward and the backward function that say what is right."""
    g = random_like(features.shape, features.dtype, features.device, 9) if grad_output is None else grad_output
    packed = "_packed" if grid_thw else ""
    forward, backward = by or (
        getattr(reference, f"lape_add{packed}"),
        getattr(reference, f"lape_add{packed}_backward"),
    )

    def run(forward, backward, features, g, tables):
        output = forward(features, *tables, *grid_thw, text_aligned, rounded)
        return output, *backward(g, *tables, *grid_thw, text_aligned)

    actual = run(getattr(ops, f"lape_add{packed}"), getattr(ops, f"lape_add{packed}_backward"), features, g, tables)
    exact = run(forward, backward, features.double(), g.double(), [table.double() for table in tables])
    assert_all_close(actual, exact, run(forward, backward, features, g, tables), NAMES)
    return actual


SHAPES = [
    ((2, 3, 4, 5, 16), (7, 6, 9)),
    ((1, 1, 1, 1, 1), (3, 4, 5)),
    ((3, 1, 2, 6, 24), (50, 50, 50)),  # images
    ((1, 3, 2, 5, 8), (1, 1, 1)),
    ((2, 11, 3, 7, 40), (4, 2, 1)),  # more patches than anchors, and more frames than a program takes
    ((1, 2, 3, 5, 600), (3, 5, 4)),  # two blocks of channels, and of patches
    ((1, 1, 2, 40, 8), (2, 3, 30)),  # two blocks of patches of the backward kernel
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_aligned", [False, True], ids=["centers", "text"])
@pytest.mark.parametrize(("shape", "counts"), SHAPES, ids=str)
def test_dense(addition, device, shape, counts, text_aligned, dtype):
    tables = random_tables(counts, shape[-1], dtype, device)
    check(addition, random_like(shape, dtype, device), tables, text_aligned=text_aligned)


def test_as_many_patches_as_anchors(addition, device):
    """Then nothing is interpolated, to the bit."""
    features = random_like((1, 5, 4, 3, 8), F32, device)
    t, h, w = random_tables((5, 4, 3), 8, F32, device)
    output = addition.lape_add(features, t, h, w)
    assert_same_bits([output], [((features + h[:, None]) + w) + t[:, None, None]])
    ones = torch.ones_like(features)
    for grad, table in zip(addition.lape_add_backward(ones, t, h, w), (t, h, w), strict=True):
        assert_same_bits([grad], [torch.full_like(table, 60 / len(table))])


@pytest.mark.parametrize(("dtype", "table_dtype"), [(F16, F32), (F32, F16), (F16, torch.float64)], ids=str)
def test_tables_of_another_dtype(addition, device, dtype, table_dtype):
    features = random_like((1, 3, 2, 4, 8), dtype, device)
    tables = random_tables((4, 3, 5), 8, table_dtype, device)
    output, *grads = addition.lape_add(features, *tables), *addition.lape_add_backward(features, *tables)
    # The reference computes in float64 where tables are float64.
    wanted = [table.float() for table in tables]
    expected = reference.lape_add(features, *wanted), *reference.lape_add_backward(features.float(), *wanted)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for grad, want in zip(grads, expected[1:], strict=True):
        assert grad.dtype == table_dtype
        torch.testing.assert_close(grad, want.to(table_dtype), rtol=2e-3 if table_dtype == F16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_rounding_every_addition(addition, device, dtype, packed):
    """As published, and in another way than without: the reference's bits, but for last bits of the tables."""
    features = random_like((1, 3, 4, 5, 64), dtype, device)
    tables = random_tables((7, 6, 9), 64, dtype, device)
    grid_thw = [torch.tensor([(3, 4, 5)], device=device)] if packed else []
    if packed:
        features = features.flatten(0, 3)
    check(addition, features, tables, *grid_thw, rounded=True)
    op, name = (addition, reference), "lape_add_packed" if packed else "lape_add"
    actual, expected = (getattr(module, name)(features, *tables, *grid_thw, False, True) for module in op)
    assert (actual != expected).float().mean() < 0.001
    assert (actual != getattr(addition, name)(features, *tables, *grid_thw)).float().mean() > 0.05


def strided_views(device):
    whole = random_like((2, 3, 4, 5, 16), F16, device)
    return {
        "permuted": whole.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "last dimension": torch.stack((whole, whole), -1).flatten(-2)[..., ::2],
        "unaligned": torch.cat((whole.flatten(), whole.flatten()[:1]))[1:].view(whole.shape),
        "expanded": whole[:1, :1, :, :1, :1].expand_as(whole),
        "scalar": torch.ones((), dtype=F16, device=device).expand_as(whole),
    }


@pytest.mark.parametrize("view", ["permuted", "last dimension", "unaligned", "expanded", "scalar"])
def test_strides(addition, device, view):
    features = strided_views(device)[view]
    whole = random_like((9, 32), F16, device, 5)
    tables = (whole[::2, ::2], whole.t()[:6, :1].expand(6, 16), whole[:1, :16].expand(3, 16))
    check(addition, features, tables, grad_output=features)


@pytest.mark.parametrize("view", ["permuted", "last dimension", "unaligned"])
@pytest.mark.parametrize("rounded", [False, True])
def test_in_place(addition, device, view, rounded):
    features = strided_views(device)[view]
    tables = random_tables((7, 6, 9), 16, F16, device)
    expected = addition.lape_add(features, *tables, True, rounded)
    assert addition.lape_add_(features, *tables, True, rounded) is None
    assert_same_bits([features], [expected])


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (1, 0, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5), (1, 2, 3, 4, 0)], ids=str
)
def test_empty(addition, device, shape):
    features = torch.zeros(shape, device=device)
    check(addition, features, random_tables((2, 3, 4), shape[-1], F32, device))
    addition.lape_add_(features, *random_tables((2, 3, 4), shape[-1], F32, device))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_infinite_and_nan_anchors(addition, device, packed):
    """What sits at an anchor takes nothing of the next one."""
    tables = random_tables((3, 5, 4), 4, F32, device)
    tables[0][1] = INF  # frames 0 and 4 of 5 do not touch it
    tables[1][3] = NAN  # nor do rows 0 to 2 of 5
    tables[2][3, 0] = -INF
    features = random_like((1, 5, 5, 4, 4), F32, device)
    features[0, 0, 0, 0, 0] = INF
    features[0, 4, 0, 3, 0] = INF  # meets -inf
    if packed:
        check(addition, features.flatten(0, 3), tables, torch.tensor([(5, 5, 4)], device=device))
    else:
        check(addition, features, tables)


def test_infinite_and_nan_gradients(addition, device):
    tables = random_tables((3, 5, 4), 4, F32, device)
    g = random_like((1, 5, 5, 4, 4), F32, device)
    g[0, 0, 1, 2, 0] = INF
    g[0, 3, 2, 2, 1] = NAN
    check(addition, torch.zeros_like(g), tables, grad_output=g)
    grid_thw = torch.tensor([(5, 5, 4)], device=device)
    check(addition, torch.zeros_like(g).flatten(0, 3), tables, grid_thw, grad_output=g.flatten(0, 3))


@pytest.mark.parametrize("slice_tokens", [2, 7, 41])
def test_slices(addition, device, monkeypatch, slice_tokens):
    """Slices that end within rows of patches and within videos; no more of them than scratch has room for."""
    monkeypatch.setattr(addition, "_SUM_SLICE", slice_tokens)
    tables = random_tables((3, 5, 4), 4, F32, device)
    check(addition, random_like((2, 2, 3, 7, 4), F32, device), tables)
    grid_thw = torch.tensor([(2, 3, 3), (1, 1, 40), (1, 2, 1), (0, 3, 3), (3, 1, 3)], device=device)
    features = random_like((int(grid_thw.prod(1).sum()), 4), F32, device)
    check(addition, features, tables, grid_thw)
    monkeypatch.setattr(addition, "_SUM_BYTES", 1)
    check(addition, features, tables, grid_thw)


def test_counting_in_64_bits(addition, device, monkeypatch):
    monkeypatch.setattr(addition, "_WIDE_FROM", 0)
    tables = random_tables((3, 5, 4), 4, F16, device)
    features = random_like((2, 2, 3, 7, 4), F16, device)
    check(addition, features, tables)
    grid_thw = torch.tensor([(2, 3, 7), (1, 2, 21)], device=device)
    check(addition, features.flatten(0, 3), tables, grid_thw, text_aligned=True)


def test_tables_with_more_rows_than_a_grid_has_blocks(addition, device, monkeypatch):
    monkeypatch.setattr(addition, "_MAX_ROWS", 5)
    check(addition, random_like((1, 2, 3, 4, 4), F32, device), random_tables((3, 5, 4), 4, F32, device))


PACKED_GRIDS = {
    "videos": [(2, 4, 3), (0, 5, 2), (3, 2, 5), (1, 1, 1)],
    "images": [(1, 3, 4), (1, 6, 2), (1, 1, 9)],
    "one": [(3, 2, 4)],
    "empty": [(0, 3, 3), (2, 0, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_aligned", [False, True], ids=["centers", "text"])
@pytest.mark.parametrize("grids", PACKED_GRIDS.values(), ids=PACKED_GRIDS)
def test_packed(addition, device, grids, text_aligned, dtype):
    grid_thw = torch.tensor(grids, dtype=torch.int64, device=device).view(-1, 3)
    features = random_like((sum(map(math.prod, grids)), 24), dtype, device)
    tables = random_tables((2, 4, 7), 24, dtype, device)
    check(addition, features, tables, grid_thw, text_aligned=text_aligned)


def test_packed_strides_and_int32_grid_on_the_host(addition, device):
    grids = PACKED_GRIDS["videos"]
    padded = torch.full((3, 2 * len(grids)), -7, dtype=torch.int32)
    padded[:, ::2] = torch.tensor(grids).t()
    features = random_like((600, sum(map(math.prod, grids))), F16, device).t()  # two blocks of channels
    check(addition, features, random_tables((2, 4, 7), 600, F16, device), padded.t()[::2], grad_output=features)
    expanded = features[:1, :8].expand(len(features), -1)
    tables = random_tables((2, 4, 7), 8, F16, device)
    check(addition, expanded, tables, padded.t()[::2], grad_output=expanded)


def test_packed_many_videos(addition, device):
    """More videos than the kernel that adds them up takes at once, most of them empty."""
    grid_thw = torch.zeros((1100, 3), dtype=torch.int64, device=device)
    grid_thw[::60] = torch.tensor([1, 2, 3], device=device)
    features = random_like((int(grid_thw.prod(1).sum()), 4), F32, device)
    check(addition, features, random_tables((2, 4, 7), 4, F32, device), grid_thw)


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


def cut(features, grid_thw):
    """Videos one after the other, with their sizes, as far as there are tokens; no size counts as more than those."""
    start = 0
    for grid in grid_thw.clamp(0, len(features) + 1).tolist():
        if start == len(features):
            return
        yield slice(start, min(start + math.prod(grid), len(features))), grid
        start = min(start + math.prod(grid), len(features))


def add_cut(features, *arguments):
    *tables, grid_thw, text_aligned, _ = arguments
    output = features.clone()
    for here, (t, h, w) in cut(features, grid_thw):
        at = torch.arange(here.stop - here.start, device=features.device)
        places = (at // w // h, at // w % h, at % w) if len(at) else (at, at, at)
        wide = torch.float64 if features.dtype == torch.float64 else F32
        spatial = "text" if text_aligned else "centers"
        total = features[here].to(wide)
        for number, size, alignment in ((1, h, spatial), (2, w, spatial), (0, t, "ends")):
            total = total + reference.resize_table(tables[number].to(wide), size, alignment)[places[number]]
        output[here] = total.to(features.dtype)
    return output


def add_cut_backward(g, *arguments):
    *tables, grid_thw, text_aligned = arguments
    tables = [table.detach().clone().requires_grad_() for table in tables]
    output = add_cut(torch.zeros_like(g), *tables, grid_thw, text_aligned, False)
    if not output.requires_grad:
        return [torch.zeros_like(table) for table in tables]
    grads = torch.autograd.grad(output, tables, g, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tables, grads, strict=True)]


@pytest.mark.parametrize("tokens", [21, 0], ids="{}-tokens".format)
@pytest.mark.parametrize("grids", MISMATCHED_GRIDS.values(), ids=MISMATCHED_GRIDS)
def test_packed_grids_that_do_not_add_up(addition, device, monkeypatch, grids, tokens):
    """Grids on a GPU are not read back, so nobody checks them: tokens past the last video stay as they are."""
    monkeypatch.setattr(addition, "_SUM_SLICE", 9)
    grid_thw = torch.tensor(grids, device=device, dtype=torch.int64).view(-1, 3)
    features = random_like((tokens, 4), F16, device)
    tables = random_tables((3, 4, 5), 4, F16, device)
    check(addition, features, tables, grid_thw, by=(add_cut, add_cut_backward))


def test_repeats_bit_by_bit(addition, device, monkeypatch):
    monkeypatch.setattr(addition, "_SUM_SLICE", 20)
    features = random_like((1, 4, 5, 6, 16), F16, device)
    tables = random_tables((5, 6, 7), 16, F16, device)
    first, second = (addition.lape_add_backward(features, *tables) for _ in range(2))
    assert_same_bits(first, second)
    # Packed is the same video in the same slices.
    grid_thw = torch.tensor([(4, 5, 6)], device=device)
    assert_same_bits(first, addition.lape_add_packed_backward(features.flatten(0, 3), *tables, grid_thw))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper_shape(addition, device, dtype):
    tables = random_tables((100, 100, 100), 3584, dtype, device)
    check(addition, random_like((1, 20, 27, 27, 3584), dtype, device), tables)
    grid_thw = torch.tensor([(7, 27, 27), (1, 14, 45), (3, 20, 11)], device=device)
    check(addition, random_like((int(grid_thw.prod(1).sum()), 3584), dtype, device), tables, grid_thw)


@needs_gpu
def test_calls_can_be_captured(addition, device):
    tables = random_tables((5, 6, 7), 16, F16, device)
    grid_thw = torch.tensor([(3, 4, 5), (1, 2, 2)], device=device)
    dense = random_like((1, 3, 4, 5, 16), F16, device)
    packed = random_like((64, 16), F16, device)

    def run():
        return (
            addition.lape_add(dense, *tables),
            *addition.lape_add_backward(dense, *tables),
            addition.lape_add_packed(packed, *tables, grid_thw),
            *addition.lape_add_packed_backward(packed, *tables, grid_thw),
        )

    assert_same_bits(run_in_a_graph(run), run())
