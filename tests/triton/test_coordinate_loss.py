"""coordinate_cross_entropy and its gradients with Triton kernels, against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from llava_st_ops import reference
from tests.triton.comparing import (
    BF16,
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

GRADIENTS = tuple(f"gradient of {name}" for name in ("hidden", "weight", "temporal", "height", "width"))
NAMES = ("losses", "logsumexp", *GRADIENTS)
INF, NAN = math.inf, math.nan
IGNORED = -100
EVERYTHING = (True, True, True)
pytestmark = ignores_numpy_warnings


@pytest.fixture
def loss(launchers):
    return launchers("coordinate_loss")


@pytest.fixture
def small_blocks(loss, monkeypatch):
    """Blocks so small that a few tokens and classes take several."""
    monkeypatch.setattr(loss, "_TOKENS", 4)
    monkeypatch.setattr(loss, "_LOGITS", 24)
    monkeypatch.setattr(loss, "_UPDATE_BLOCK", 4)
    monkeypatch.setattr(loss, "_GRADIENTS_BLOCK", 2)
    monkeypatch.setattr(loss, "_LOSSES_BLOCK", 4)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    temporal: Tensor
    height: Tensor
    width: Tensor
    labels: Tensor
    axis: Tensor
    positions: Tensor
    grad_losses: Tensor
    ignore_index: int = IGNORED
    wanted: tuple[bool, bool, bool] = EVERYTHING

    def sources(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.temporal, self.height, self.width

    def widened(self, dtype: torch.dtype) -> Problem:
        names = ("hidden", "weight", "temporal", "height", "width", "grad_losses")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def by(self, forward, backward) -> tuple[Tensor, ...]:
        tokens = (self.labels, self.axis, self.positions, self.ignore_index)
        losses, logsumexp = forward(*self.sources(), *tokens)
        return losses, logsumexp, *backward(self.grad_losses, logsumexp, *self.sources(), *tokens, *self.wanted)

    def by_triton(self, loss) -> tuple[Tensor, ...]:
        return self.by(loss.coordinate_cross_entropy, loss.coordinate_cross_entropy_backward)

    def by_reference(self) -> tuple[Tensor, ...]:
        return self.by(reference.coordinate_losses, reference.coordinate_losses_backward)


# Each token: label, axis, position; the reason it is here. Of 11 words, 4, 5 and 3 anchors.
TOKENS = [
    (0, -1, NAN, "first word"),
    (10, -1, NAN, "last word"),
    (IGNORED, -1, NAN, "ignored"),
    (11, -1, NAN, "first anchor of all, by its label"),
    (22, -1, 0.5, "last class of all"),
    (3, 0, 0.45, "between temporal anchors"),
    (-9, 1, 0.3, "between anchors of height; the label is not read"),
    (99, 2, 0.8, "between anchors of width"),
    (IGNORED, 77, 0.5, "ignored: nothing else is read"),
    (3, 0, 0.0, "the first anchor"),
    (3, 1, 1.0, "the last anchor"),
    (3, 2, 0.5, "an anchor in the middle"),
    (3, 0, -0.5, "clipped to 0"),
    (3, 1, INF, "clipped to 1"),
]
ROWS = (11, 4, 5, 3)


def make_problem(dtype, device, tokens=TOKENS, rows=ROWS, channels=16, table_dtype=None, label_dtype=torch.int64):
    labels, axis, positions, *_ = zip(*tokens, strict=True) if tokens else ((), (), ())
    dtypes = (dtype, *(table_dtype or dtype,) * 3)
    return Problem(
        random_like((len(labels), channels), dtype, device, 7),
        *(random_like((n, channels), of, device, seed) for seed, (n, of) in enumerate(zip(rows, dtypes, strict=True))),
        torch.tensor(labels, dtype=label_dtype, device=device),
        torch.tensor(axis, dtype=torch.int8, device=device),
        torch.tensor(positions, dtype=torch.float64, device=device),
        random_like(len(labels), F32, device, 8),
    )


def check(loss, problem):
    actual = problem.by_triton(loss)
    exact = problem.widened(torch.float64).by_reference()
    assert_all_close(actual, exact, problem.by_reference(), NAMES)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 70])
def test_one_block(loss, device, channels, dtype):
    check(loss, make_problem(dtype, device, channels=channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 14])
def test_many_blocks(loss, device, small_blocks, tokens, dtype):
    check(loss, make_problem(dtype, device, tokens=TOKENS[-tokens:]))


def test_blocks_of_one_class(loss, device, small_blocks, monkeypatch):
    monkeypatch.setattr(loss, "_LOGITS", 1)
    check(loss, make_problem(F32, device, tokens=TOKENS[3:8]))


def test_blocks_of_classes_that_make_whole_vectors(loss, device):
    """Blocks cover all classes in order, none larger than its tile."""
    sources = [torch.zeros(rows, 1) for rows in (151660, 100, 0, 1)]
    for tokens in (1, 100, 2700, 10**6):
        blocks = list(loss._class_blocks(sources, tokens))
        first = 0
        for number, source in enumerate(sources):
            starts = [rows.start for source_number, _, rows in blocks if source_number == number]
            stops = [rows.stop for source_number, _, rows in blocks if source_number == number]
            assert starts == ([0, *stops[:-1]] if len(source) else [])
            assert not stops or stops[-1] == len(source)
            assert [at for source_number, at, _ in blocks if source_number == number] == [first + s for s in starts]
            first += len(source)
        sizes = [rows.stop - rows.start for _, _, rows in blocks]
        assert max(sizes) * min(tokens, loss._TOKENS) * 4 <= 64 * 2**20
        assert sizes[0] % 16 == 0
        assert len(blocks) < 100


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_that_are_wanted(loss, device, small_blocks, wanted):
    actual = check(loss, replace(make_problem(F32, device), wanted=wanted))
    all_wanted = (*wanted, wanted[2], wanted[2])
    assert [grad.shape == (0,) for grad in actual[2:]] == [not want for want in all_wanted]


@pytest.mark.parametrize(("dtype", "table_dtype"), [(F16, F32), (F32, F16)], ids=str)
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_other_dtypes(loss, device, small_blocks, dtype, table_dtype, label_dtype):
    check(loss, make_problem(dtype, device, table_dtype=table_dtype, label_dtype=label_dtype))


def test_strides(loss, device, small_blocks):
    problem = make_problem(F32, device)
    check(
        loss,
        replace(
            problem,
            hidden=problem.hidden.t().contiguous().t(),
            weight=torch.stack((problem.weight, problem.weight), -1).flatten(-2)[:, ::2],
            temporal=problem.temporal[:1].expand(4, 16),
            height=problem.height[:, :1].expand(5, 16),
            labels=torch.stack((problem.labels, problem.labels), 1)[:, 1],
            axis=torch.stack((problem.axis, problem.axis), 1)[:, 0],
            positions=torch.stack((problem.positions, problem.positions), 1)[:, 0],
            grad_losses=torch.ones((), device=device).expand(len(TOKENS)),
        ),
    )
    check(loss, replace(problem, hidden=problem.hidden[:1].expand(len(TOKENS), 16)))


@pytest.mark.parametrize("channels", [0, 8])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("rows", [(0, 1, 1, 1), ROWS], ids=str)
def test_empty(loss, device, rows, tokens, channels):
    problem = make_problem(F16, device, tokens=[(0, -1, NAN), (0, 2, 0.3)][:tokens], rows=rows, channels=channels)
    check(loss, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored(loss, device, small_blocks, dtype):
    problem = make_problem(dtype, device)
    actual = problem.by_triton(loss)
    check(loss, replace(problem, labels=torch.full_like(problem.labels, IGNORED)))
    results = replace(problem, labels=torch.full_like(problem.labels, 7), ignore_index=7).by_triton(loss)
    assert not any(result.any() for result in results)
    assert actual[0].any()


def test_what_ignored_tokens_hold_takes_no_part(loss, device, small_blocks):
    """Padding may be NaN, and its loss have any gradient."""
    problem = make_problem(F32, device)
    problem.hidden[2], problem.hidden[8] = NAN, INF
    problem.grad_losses[2], problem.grad_losses[8] = NAN, INF
    check(loss, problem)


@pytest.mark.parametrize("wrong", [(23, -1, NAN), (-1, -1, NAN), (0, 3, 0.5), (0, -2, 0.5), (0, 1, NAN)], ids=str)
def test_what_does_not_exist_loses_nan(loss, device, small_blocks, wrong):
    """Nobody checks labels on a device, and there is nobody to tell: the loss shows it, and no other is touched."""
    tokens = [*TOKENS[:3], (*wrong, "wrong"), *TOKENS[4:]]
    actual = make_problem(F32, device, tokens=tokens).by_triton(loss)
    expected = make_problem(F32, device).by_triton(loss)
    nan = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    nan[3] = True
    assert_same_bits([actual[0].isnan(), actual[2].isnan().all(1), actual[2].isnan().any(1)], [nan] * 3)
    assert_same_bits([actual[0][~nan], actual[1], actual[2][~nan]], [expected[0][~nan], expected[1], expected[2][~nan]])


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_infinite_and_nan_logits(loss, device, small_blocks, value):
    """In classes that a token should be, and in others; in the first block and in a later one."""
    problem = make_problem(F32, device, channels=4)
    problem.hidden.abs_()
    problem.hidden[0, 0] = value
    problem.hidden[6, 1] = value
    actual, same = problem.by_triton(loss), problem.by_reference()
    exact = problem.widened(torch.float64).by_reference()
    assert_all_close(actual[:2], exact[:2], same[:2], NAMES[:2])
    problem = make_problem(F32, device, channels=4)
    problem.weight[9, 0] = value
    assert_all_close(
        problem.by_triton(loss)[:2],
        problem.widened(torch.float64).by_reference()[:2],
        problem.by_reference()[:2],
        NAMES[:2],
    )


def test_all_logits_minus_infinity(loss, device, small_blocks):
    problem = make_problem(F32, device, tokens=TOKENS[:2], channels=1)
    problem.hidden.fill_(1)
    for source in problem.sources()[1:]:
        source.fill_(-INF)
    losses, logsumexp, *_ = problem.by_triton(loss)
    assert losses.isnan().all()
    assert_same_bits([logsumexp], [torch.full_like(logsumexp, -INF)])


def test_logits_too_large_for_an_exponential(loss, device, small_blocks):
    problem = make_problem(F32, device)
    check(loss, replace(problem, hidden=problem.hidden * 100))


def test_gradients_too_small_for_float16(loss, device, small_blocks):
    """Of a mean over many tokens, each spread over many classes."""
    problem = make_problem(F16, device)
    problem = replace(problem, hidden=problem.hidden / 8, grad_losses=problem.grad_losses * 2.0**-20)
    actual = problem.by_triton(loss)
    scaled = replace(problem, grad_losses=problem.grad_losses * 2.0**20).by_triton(loss)
    for grad, large, name in zip(actual[2:], scaled[2:], GRADIENTS, strict=True):
        small = large.float() * 2.0**-20
        assert (grad.float() - small).abs().max() <= 2.0**-24, name


@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e30])
def test_gradients_of_any_size(loss, device, factor):
    problem = make_problem(F32, device, channels=4)
    check(loss, replace(problem, grad_losses=problem.grad_losses * factor))


def test_gradients_that_are_not_finite(loss, device, small_blocks):
    problem = make_problem(F32, device, channels=4)
    problem.grad_losses[0], problem.grad_losses[4] = NAN, INF
    expected = make_problem(F32, device, channels=4).by_triton(loss)[2]
    grad_hidden = problem.by_triton(loss)[2]
    finite = torch.ones(len(TOKENS), dtype=torch.bool, device=device)
    finite[0] = finite[4] = False
    assert not grad_hidden[~finite].isfinite().any()
    torch.testing.assert_close(grad_hidden[finite], expected[finite])


def test_repeats_bit_by_bit(loss, device, small_blocks):
    problem = make_problem(F16, device)
    assert_same_bits(problem.by_triton(loss), problem.by_triton(loss))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper_shape(loss, device, dtype):
    problem = make_problem(dtype, device, tokens=TOKENS * 100, rows=(20000, 100, 100, 100), channels=3584)
    problem = replace(problem, hidden=problem.hidden / 60)
    check(loss, replace(problem, labels=problem.labels.clamp(max=20299)))


@needs_gpu
def test_memory(loss, device):
    """What is held besides inputs and results, for a published sample, stays below 128 MiB."""
    problem = make_problem(BF16, device, tokens=TOKENS * 193, rows=(151660, 100, 100, 100), channels=3584)
    results = problem.by_triton(loss)
    held = sum(result.nbytes for result in results)
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.by_triton(loss)
    assert torch.cuda.max_memory_allocated() - before - held <= 128 * 2**20


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_can_be_captured(loss, device, dtype):
    problem = make_problem(dtype, device)

    def run():
        return problem.by_triton(loss)

    assert_same_bits(run_in_a_graph(run), run())
