"""The Triton kernels of lape_scatter and of its gradients, against the float64 reference."""

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

NAMES = tuple(f"gradient of {name}" for name in ("embed", "temporal", "height", "width", "visual"))
INF, NAN = math.inf, math.nan
pytestmark = ignores_numpy_warnings


@pytest.fixture
def scattering(launchers):
    return launchers("scattering")


def random_sources(rows, channels, dtype, device, table_dtype=None):
    """embed, the tables and visual."""
    dtypes = (dtype, *(table_dtype or dtype,) * 3, dtype)
    return [random_like((n, channels), of, device, seed) for seed, (n, of) in enumerate(zip(rows, dtypes, strict=True))]


# Each token: id, axis, position, visual index; the reason it is here. Of 6 ids, 4, 5 and 3 anchors, 7 visual tokens.
TOKENS = [
    (0, -1, NAN, -1, "first id"),
    (5, -1, NAN, -1, "last id"),
    (6, -1, NAN, -1, "first temporal anchor, by its id"),
    (9, -1, NAN, -1, "last temporal anchor"),
    (10, -1, NAN, -1, "first of height"),
    (15, -1, NAN, -1, "first of width"),
    (17, -1, 0.5, -1, "last of width"),
    (3, 0, 0.45, -1, "between temporal anchors"),
    (-9, 1, 0.3, -1, "between anchors of height; the id is not read"),
    (99, 2, 0.8, -1, "between anchors of width"),
    (3, 0, 0.0, -1, "the first anchor"),
    (3, 1, 1.0, -1, "the last anchor"),
    (3, 2, 0.5, -1, "an anchor in the middle"),
    (3, 0, -0.5, -1, "clipped to 0"),
    (3, 1, 7.0, -1, "clipped to 1"),
    (3, 2, INF, -1, "clipped to 1, too"),
    (3, 0, -INF, -1, "clipped to 0, too"),
    (3, 1, 1e-300, -1, "hardly between anchors"),
    (99, 77, NAN, 0, "visual: nothing else is read"),
    (0, -1, NAN, 6, "the last visual token"),
    (0, -1, NAN, 6, "the same again"),
    (0, -1, NAN, -1, "the first id again"),
]
ROWS = (6, 4, 5, 3, 7)


def token_tensors(tokens, device, index_dtype=torch.int64):
    ids, axis, positions, visual_index, *_ = zip(*tokens, strict=True)
    return (
        torch.tensor(ids, dtype=index_dtype, device=device),
        torch.tensor(axis, dtype=torch.int8, device=device),
        torch.tensor(positions, dtype=torch.float64, device=device),
        torch.tensor(visual_index, dtype=index_dtype, device=device),
    )


def check_forward(scattering, sources, tokens):
    embed, *tables, visual = sources
    actual = scattering.lape_scatter(embed, *tables, *tokens, visual)
    wide = [source.double() for source in sources]
    exact = reference.lape_scatter(*wide[:4], *tokens, wide[4])
    assert_all_close([actual], [exact], [reference.lape_scatter(embed, *tables, *tokens, visual)], ["output"])
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 24, 1100])
def test_forward(scattering, device, channels, dtype):
    check_forward(scattering, random_sources(ROWS, channels, dtype, device), token_tensors(TOKENS, device))


@pytest.mark.parametrize(("dtype", "table_dtype"), [(F16, F32), (F32, F16)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_other_dtypes(scattering, device, dtype, table_dtype, index_dtype):
    sources = random_sources(ROWS, 8, dtype, device, table_dtype)
    check_forward(scattering, sources, token_tensors(TOKENS, device, index_dtype))


def test_rows_are_copied_to_the_bit(scattering, device):
    sources = random_sources(ROWS, 8, F16, device)
    sources[1][0] = INF
    sources[2][1] = NAN
    sources[3][1] = -INF  # the exact anchor in the middle; the row between 1 and 2 has it as well
    output = check_forward(scattering, sources, token_tensors(TOKENS, device))
    for token, (source, row) in {
        0: (0, 0),
        1: (0, 5),
        3: (1, 3),
        6: (3, 2),
        10: (1, 0),
        12: (3, 1),
        19: (4, 6),
    }.items():
        assert_same_bits([output[token]], [sources[source][row]])


def test_strides(scattering, device):
    embed, temporal, height, width, visual = random_sources(ROWS, 16, F32, device)
    sources = (
        embed.t().contiguous().t(),
        torch.stack((temporal, temporal), -1).flatten(-2)[:, ::2],
        height[:1].expand(5, 16),
        width[:, :1].expand(3, 16),
        torch.cat((visual, visual), 1)[:, 16:],
    )
    tokens = [torch.stack((x, x), 1)[:, 1] for x in token_tensors(TOKENS, device)]
    check_forward(scattering, sources, tokens)
    one = [x[7:8].expand(9) for x in tokens]
    check_forward(scattering, sources, one)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("channels", [0, 4])
def test_empty(scattering, device, tokens, channels):
    """No tokens; no channels; neither embeddings nor visual tokens."""
    sources = random_sources((0, 1, 1, 1, 0), channels, F32, device)
    check_forward(scattering, sources, [x[:tokens] for x in token_tensors([(0, 0, 0.3, -1)] * 3, device)])
    none = torch.empty(0, dtype=torch.int64, device=device)
    grads = scattering.lape_scatter_backward(sources[0][:0], none, none, none.double(), *sources)
    assert_same_bits(grads, [torch.zeros_like(source) for source in sources])


WRONG = [
    (6 + 4 + 5 + 3, -1, NAN, -1),
    (-1, -1, NAN, -1),
    (-(2**31), -1, NAN, -1),
    (2**31 - 1, -1, NAN, -1),
    (0, 3, 0.5, -1),
    (0, -2, 0.5, -1),
    (0, 127, 0.5, -1),
    (0, 1, NAN, -1),
    (0, -1, NAN, 7),
    (0, 1, 0.5, -2),
]


def test_what_does_not_exist_becomes_nan(scattering, device):
    """Nobody checks indices on a device, and there is nobody to tell: the row shows it, and no other is touched."""
    embed, *tables, visual = random_sources(ROWS, 8, F16, device)
    wrong = token_tensors(WRONG, device, torch.int32)
    assert scattering.lape_scatter(embed, *tables, *wrong, visual).isnan().all()
    pairs = zip(wrong, token_tensors(TOKENS[:1], device), strict=True)
    mixed = [torch.stack((x, y.expand_as(x)), 1).flatten() for x, y in pairs]
    output = scattering.lape_scatter(embed, *tables, *mixed, visual)
    assert output[::2].isnan().all()
    assert_same_bits([output[1::2]], [embed[:1].expand(len(WRONG), -1)])


def random_entries(rows, entries, tokens, device, seed=3):
    """Entries in the order of their destinations, some of them past the last."""
    generator = torch.Generator().manual_seed(seed)
    destination = torch.randint(sum(rows) + 2, (entries,), generator=generator).sort().values
    token = torch.randint(max(tokens, 1), (entries,), generator=generator)
    share = torch.rand(entries, generator=generator, dtype=torch.float64)
    return destination.to(device), token.to(device), share.to(device)


def check_backward(scattering, grad_output, entries, sources):
    actual = scattering.lape_scatter_backward(grad_output, *entries, *sources)
    wide = [source.double() for source in sources]
    exact = reference.lape_scatter_backward(grad_output.double(), *entries, *wide)
    assert_all_close(actual, exact, reference.lape_scatter_backward(grad_output, *entries, *sources), NAMES)
    assert [grad.dtype for grad in actual] == [source.dtype for source in sources]
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "entries", "channels"), [(ROWS, 60, 24), (ROWS, 5, 1100), ((1, 1, 1, 1, 1), 40, 1)])
def test_backward(scattering, device, rows, entries, channels, dtype):
    grad_output = random_like((11, channels), dtype, device)
    sources = random_sources(rows, channels, dtype, device)
    check_backward(scattering, grad_output, random_entries(rows, entries, 11, device), sources)


@pytest.mark.parametrize(("dtype", "table_dtype"), [(F16, F32), (F32, F16)], ids=str)
def test_backward_of_tables_of_another_dtype(scattering, device, dtype, table_dtype):
    sources = random_sources(ROWS, 8, dtype, device, table_dtype)
    entries = random_entries(ROWS, 40, 9, device)
    check_backward(scattering, random_like((9, 8), dtype, device), entries, sources)


def test_backward_of_strided_and_expanded_gradients(scattering, device):
    sources = [source.t().contiguous().t() for source in random_sources(ROWS, 8, F32, device)]
    entries = [torch.stack((x, x), 1)[:, 0] for x in random_entries(ROWS, 40, 9, device)]
    whole = random_like((8, 9), F32, device)
    for grad_output in (whole.t(), whole.t()[:1].expand(9, 8), torch.ones((), device=device).expand(9, 8)):
        check_backward(scattering, grad_output, entries, sources)


def test_backward_of_one_destination(scattering, device):
    """Rows without entries are zero; every entry has the same row, or none at all."""
    grad_output = random_like((50, 8), F16, device)
    sources = random_sources(ROWS, 8, F16, device)
    share = torch.ones(50, dtype=torch.float64, device=device)
    token = torch.arange(50, device=device)
    for row in (0, 8, sum(ROWS) - 1, sum(ROWS), 10**12):
        check_backward(scattering, grad_output, (torch.full_like(token, row), token, share), sources)


def test_backward_of_infinite_gradients(scattering, device):
    """What is not finite reaches the rows of its own entries."""
    grad_output = random_like((11, 4), F32, device)
    grad_output[3, 0], grad_output[4, 1], grad_output[5, 0] = INF, NAN, -INF
    check_backward(scattering, grad_output, random_entries(ROWS, 30, 11, device), random_sources(ROWS, 4, F32, device))


def test_backward_of_tokens_that_do_not_exist(scattering, device):
    sources = random_sources(ROWS, 4, F32, device)
    destination = torch.tensor([1, 2, 3], device=device)
    token = torch.tensor([0, 5, -1], device=device)
    share = torch.ones(3, dtype=torch.float64, device=device)
    grad, *_ = scattering.lape_scatter_backward(torch.ones(5, 4, device=device), destination, token, share, *sources)
    assert grad.isnan().all(1).tolist() == [False, False, True, True, False, False]


def test_repeats_bit_by_bit(scattering, device):
    sources = random_sources(ROWS, 16, F16, device)
    entries = random_entries(ROWS, 60, 9, device)
    grad_output = random_like((9, 16), F16, device)
    first, second = (scattering.lape_scatter_backward(grad_output, *entries, *sources) for _ in range(2))
    assert_same_bits(first, second)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper_shape(scattering, device, dtype):
    rows = (5000, 100, 100, 100, 2520)
    sources = random_sources(rows, 3584, dtype, device)
    tokens = token_tensors(TOKENS * 100, device)
    check_forward(scattering, sources, tokens)
    grad_output = random_like((2200, 3584), dtype, device)
    check_backward(scattering, grad_output, random_entries(rows, 4000, 2200, device), sources)


@needs_gpu
def test_calls_can_be_captured(scattering, device):
    embed, *tables, visual = sources = random_sources(ROWS, 16, F16, device)
    tokens = token_tensors(TOKENS, device)
    entries = random_entries(ROWS, 60, 9, device)
    grad_output = random_like((9, 16), F16, device)

    def run():
        output = scattering.lape_scatter(embed, *tables, *tokens, visual)
        return output, *scattering.lape_scatter_backward(grad_output, *entries, *sources)

    assert_same_bits(run_in_a_graph(run), run())
