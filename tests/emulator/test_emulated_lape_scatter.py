"""What is special about the CUDA kernels of lape_scatter: layouts, segments, missing sources.

They run in the emulator, as raw ops. The tests of all backends (tests/ops) run there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from llava_st_ops import reference
from tests.emulator.backend import DTYPES, emulated, launched
from tests.emulator.emulated_lape import INF, NAN, TABLES, elements, in_nan, random, random_tables, raw, wide
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned_results", "ops")


@dataclass
class Scatter:
    """Arguments of a call, and the entries of its gradient."""

    embed: torch.Tensor
    tables: list[torch.Tensor]
    input_ids: torch.Tensor
    axis: torch.Tensor
    positions: torch.Tensor
    visual_index: torch.Tensor
    visual: torch.Tensor

    def arguments(self, embed=None, tables=None, visual=None):
        sources = (self.embed if embed is None else embed, *(tables or self.tables))
        visual = self.visual if visual is None else visual
        return (*sources, self.input_ids, self.axis, self.positions, self.visual_index, visual)

    def sources(self) -> list[torch.Tensor]:
        return [self.embed, *self.tables, self.visual]

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of every token the rows that it takes, as numbers, and their shares: as csrc/lape_call.h wants them."""
        entries = []
        counts = [len(x) for x in self.sources()]
        begins = [sum(counts[:i]) for i in range(len(counts))]
        for token, (number, axis, position, index) in enumerate(
            zip(*(x.tolist() for x in (self.input_ids, self.axis, self.positions, self.visual_index)), strict=True)
        ):
            if index >= 0:
                entries.append((begins[4] + index, token, 1.0))
            elif axis >= 0:
                anchor = min(max(position, 0.0), 1.0) * (counts[1 + axis] - 1)
                low, ratio = math.floor(anchor), anchor - math.floor(anchor)
                entries.append((begins[1 + axis] + low, token, 1.0 - ratio))
                entries.append((begins[1 + axis] + math.ceil(anchor), token, ratio) if ratio else (sum(counts), 0, 0.0))
            else:
                entries.append((number, token, 1.0))
        entries.sort(key=lambda entry: entry[0])  # stable
        destination, token, share = zip(*entries, strict=True) if entries else ((), (), ())
        return torch.tensor(destination).long(), torch.tensor(token).long(), torch.tensor(share).double()


def scatter_case(dtype, tables=None, tokens=40, channels=16, rows=(11, 4, 3, 1, 6), integers=torch.int64, seed=0):
    """Tokens of every kind; some rows are taken by many, some by none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (tokens,), generator=generator)

    v, *anchors, m = rows
    axis = draw(-3, 3).clamp(min=-1).to(torch.int8)
    visual_index = torch.where(draw(0, 3) == 0, draw(0, m), torch.tensor(-1)) if m else torch.full((tokens,), -1)
    positions = torch.rand(tokens, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    positions[::5] = (positions[::5] * 4).round() / 4
    positions[axis < 0] = NAN
    positions[visual_index >= 0] = NAN
    input_ids = draw(0, v + sum(anchors))
    input_ids[visual_index >= 0] = -200
    return Scatter(
        random(v, channels, seed=seed, dtype=dtype),
        random_tables(anchors, channels, tables or dtype, seed),
        input_ids.to(integers),
        axis,
        positions,
        visual_index.to(integers),
        random(m, channels, seed=seed + 9, dtype=dtype),
    )


def scatter_gradients(case: Scatter, grad_output: torch.Tensor, double: bool) -> tuple[torch.Tensor, ...]:
    sources = [(x.double() if double else x.detach()).requires_grad_() for x in case.sources()]
    result = reference.lape_scatter(*case.arguments(sources[0], sources[1:4], sources[4]))
    grads = torch.autograd.grad(result, sources, grad_output.to(result.dtype), allow_unused=True)
    return tuple(
        torch.zeros_like(source) if grad is None else grad for source, grad in zip(sources, grads, strict=True)
    )


def check_scatter(case: Scatter, grad_output: torch.Tensor | None = None) -> None:
    result = raw().lape_scatter(*case.arguments())
    assert result.is_contiguous()
    exact = reference.lape_scatter(*case.arguments(case.embed.double(), wide(*case.tables), case.visual.double()))
    assert_accurate(result, exact, reference.lape_scatter(*case.arguments()))
    if grad_output is None:
        grad_output = random(*result.shape, seed=5, dtype=result.dtype)
    grads = raw().lape_scatter_backward(grad_output, *case.entries(), *case.sources())
    wanted, same = scatter_gradients(case, grad_output, True), scatter_gradients(case, grad_output, False)
    for name, grad, exact_grad, dtype_grad in zip(("embed", *TABLES, "visual"), grads, wanted, same, strict=True):
        assert grad.is_contiguous()
        assert_accurate(grad, exact_grad, dtype_grad, name)


SCATTER_KERNELS = ("lape_scatter_forward", "lape_scatter_gather")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 3, 12, 4])
def test_scatter(channels, tables, dtype):
    with launched() as names:
        check_scatter(scatter_case(dtype, tables, channels=channels))
    per_load = 16 // dtype.itemsize
    for kernel in SCATTER_KERNELS:
        assert elements(names, kernel) == {per_load if channels % per_load == 0 else 1}


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [(11, 4, 3, 1, 0), (0, 1, 1, 1, 2), (3, 100, 2, 7, 1)], ids=str)
def test_scatter_rows(rows, integers):
    check_scatter(scatter_case(torch.bfloat16, rows=rows, integers=integers))


@pytest.mark.parametrize("channels", [528, 1056, 4200])
def test_scatter_long_rows(channels):
    """A thread copies several packets of them at once, and may have none left."""
    check_scatter(scatter_case(torch.bfloat16, tokens=6, channels=channels, rows=(5, 2, 2, 2, 3)))


def test_scatter_fewer_blocks_than_work():
    with emulated(max_blocks=2):
        check_scatter(scatter_case(torch.float32))


def test_scatter_no_tokens():
    case = scatter_case(torch.bfloat16, tokens=0)
    assert raw().lape_scatter(*case.arguments()).shape == (0, 16)
    for grad in raw().lape_scatter_backward(torch.empty(0, 16).bfloat16(), *case.entries(), *case.sources()):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("at", "spare", "vectors"), [(0, 8, True), (8, 8, True), (1, 7, False), (0, 1, False)], ids=str
)
def test_scatter_views_into_nan(at, spare, vectors, dtype):
    """Unaligned tables do not keep the other rows from moving in vectors."""
    case = scatter_case(dtype)
    case.embed, case.visual = in_nan(case.embed, at, spare), in_nan(case.visual, at, spare)
    case.tables = [in_nan(table, 1, 1) for table in case.tables]
    with launched() as names:
        check_scatter(case, in_nan(random(40, 16, dtype=dtype), at, spare))
    for kernel in SCATTER_KERNELS:
        assert elements(names, kernel) == {16 // dtype.itemsize if vectors else 1}


def test_scatter_strided_vectors():
    case = scatter_case(torch.float32, integers=torch.int32)
    for name in ("input_ids", "axis", "positions", "visual_index"):
        vector = getattr(case, name)
        setattr(case, name, torch.stack([vector, torch.full_like(vector, 99)], 1)[:, 0])
    check_scatter(case)


def test_scatter_columns_and_expanded_gradients():
    """Rows that are not contiguous are copied."""
    case = scatter_case(torch.bfloat16)
    case.embed, case.visual = case.embed.t().contiguous().t(), case.visual.t().contiguous().t()
    case.tables = [table.t().contiguous().t() for table in case.tables]
    check_scatter(case, torch.ones((), dtype=torch.bfloat16).expand(40, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [63, 64, 65, 300])
def test_scatter_hot_rows(tokens, dtype):
    """All take one row, or one of two: runs of entries are summed in segments."""
    case = scatter_case(dtype, tokens=tokens, rows=(3, 2, 1, 1, 1), channels=8)
    case.visual_index[:] = -1
    case.axis[:] = -1
    case.input_ids[:] = 1
    check_scatter(case)
    case.input_ids[tokens // 3 :] = 4  # of temporal
    check_scatter(case)


def test_scatter_tokens_without_a_row():
    """Where a GPU reads them nothing is checked: the row becomes NaN, and no other."""
    case = scatter_case(torch.bfloat16, rows=(5, 4, 3, 2, 6), tokens=16)
    case.visual_index[:], case.axis[:], case.positions[:] = -1, -1, 0.5
    case.input_ids[:] = torch.arange(16) % 14
    expected = raw().lape_scatter(*case.arguments())
    assert not expected.isnan().any()
    wrong = {
        0: ("input_ids", -1),
        1: ("input_ids", 14),
        2: ("input_ids", 2**62),
        3: ("input_ids", -(2**62)),
        5: ("visual_index", 6),
        6: ("visual_index", -2),
        7: ("visual_index", 2**62),
        9: ("axis", 3),
        10: ("axis", -2),
        11: ("axis", 127),
        13: ("positions", NAN),
    }
    for token, (name, value) in wrong.items():
        getattr(case, name)[token] = value
    case.axis[13] = 1
    result = raw().lape_scatter(*case.arguments())
    assert result.isnan().all(1).nonzero().flatten().tolist() == list(wrong)
    right = [token for token in range(16) if token not in wrong]
    assert torch.equal(result[right], expected[right])
    # What does not count is not looked at.
    case.visual_index[:] = 0
    case.positions[:] = NAN
    assert torch.equal(raw().lape_scatter(*case.arguments()), case.visual[:1].expand(16, 16))


def test_scatter_positions_beyond_the_axis_and_infinite_neighbours():
    case = scatter_case(torch.float32, tokens=7)
    case.visual_index[:], case.axis[:] = -1, 0
    case.positions[:] = torch.tensor([-INF, -0.5, -0.0, 1.0, 1 / 3, 7.0, INF])
    case.tables[0][2] = INF
    check_scatter(case)


def test_scatter_entries_without_a_token():
    """They make their row NaN, and nothing is read out of bounds."""
    case = scatter_case(torch.float32, tokens=4)
    destination = torch.tensor([0, 1, 1, 3, 3, 10**6])
    token = torch.tensor([0, 1, 4, -1, 2, 2**62])
    share = torch.ones(6, dtype=torch.float64)
    embed, *others = raw().lape_scatter_backward(random(4, 16), destination, token, share, *case.sources())
    assert embed.isnan().all(1).nonzero().flatten().tolist() == [1, 3]
    assert embed.isnan().sum() == 32
    assert not any(x.any() for x in others)


@pytest.mark.parametrize("entries", [[-7] * 100, [2**62] * 100], ids=["-7", "2^62"])
def test_scatter_destinations_that_make_no_sense(entries):
    """Nothing is out of bounds, and every gradient is written."""
    case = scatter_case(torch.bfloat16, tokens=4)
    tokens = torch.zeros(len(entries), dtype=torch.int64)
    share = torch.ones(len(entries), dtype=torch.float64)
    grads = raw().lape_scatter_backward(
        random(4, 16, dtype=torch.bfloat16), torch.tensor(entries), tokens, share, *case.sources()
    )
    assert not any(x.isnan().any() for x in grads)
