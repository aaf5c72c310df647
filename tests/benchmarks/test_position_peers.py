"""The baselines of LAPE and the coordinate loss compute what the reference does, and so do all contenders."""

from __future__ import annotations

import sys

import torch

from benchmarks import position_workloads
from benchmarks.loss_peers import fused_losses
from benchmarks.position_peers import chunked_loss, eager_add, eager_add_in_place, eager_scatter
from llava_st_ops import reference
from tests.ops.test_coordinate_cross_entropy import SOURCES
from tests.ops.test_coordinate_cross_entropy import problem as loss_problem
from tests.ops.test_lape_add import inputs_of
from tests.ops.test_lape_scatter import NAMES, TOKENS
from tests.ops.test_lape_scatter import problem as scatter_problem


def test_addition():
    inputs = inputs_of((1, 10, 27, 27), 8, (100, 100, 100), torch.float64, "cpu")
    expected = reference.lape_add(*inputs)
    torch.testing.assert_close(eager_add(*inputs), expected)
    torch.testing.assert_close(eager_add_in_place(*inputs), expected)


def test_embeddings():
    values = scatter_problem(60, 8, torch.float64)
    output = eager_scatter(*(values[name] for name in NAMES), *(values[name] for name in TOKENS))
    torch.testing.assert_close(output, reference.lape_scatter(**values))


def test_loss_and_its_gradients():
    values = loss_problem(50, 8, dtype=torch.float64)
    values["labels"] = values["labels"].clamp(min=0)  # all active
    leaves = [values[name].requires_grad_() for name in SOURCES]
    loss = chunked_loss(**values, chunk=7)
    expected = reference.coordinate_cross_entropy(**values)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves))


def test_workloads(monkeypatch):
    """Each contender computes what the truth has, on a small problem."""
    monkeypatch.setattr(position_workloads, "WIDTH", 16)
    monkeypatch.setattr(
        position_workloads, "patch_features", lambda clip, frames, width, device: torch.randn(1, frames, 3, 3, width)
    )
    as_it_is = lambda function: function  # noqa: E731 - what others decorate when they are imported, too
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or as_it_is)
    monkeypatch.setattr(position_workloads, "TOKENS", 20)
    monkeypatch.setattr(position_workloads, "WORDS", 64)
    for build, _ in position_workloads.BUILDERS.values():
        workload = build(None, torch.device("cpu"))
        truth = workload.truth()
        assert workload.baseline in [contender.name for contender in workload.contenders]
        for contender in workload.contenders:
            assert (contender.role == "yardstick") == (not contender.checked)
            if contender.checked and contender.call is not None:
                for result, expected in zip(contender.call(), truth.values(), strict=False):
                    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


def test_fused_losses_of_others_without_a_gpu():
    """What is written in Triton is named with the reason, and not timed in Triton's interpreter."""
    found = fused_losses(torch.device("cpu"))
    for name in ("Liger-Kernel", "cut-cross-entropy, gradient filtering", "cut-cross-entropy, no gradient filtering"):
        assert "need a GPU" in found[name]


def test_a_loss_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    assert "cut_cross_entropy" in fused_losses(torch.device("cpu"))["cut-cross-entropy, torch.compile"]


def test_a_loss_of_others_is_one_of_the_contenders(monkeypatch):
    """With the gradients of all tables, which it has as one."""
    monkeypatch.setattr(position_workloads, "TOKENS", 20)
    monkeypatch.setattr(position_workloads, "WORDS", 64)

    def plain(hidden, classes, labels):
        return torch.nn.functional.cross_entropy(hidden @ classes.T, labels)

    monkeypatch.setattr(position_workloads, "fused_losses", lambda device: {"plain": plain, "absent": "why"})
    workload = position_workloads.hard_loss_workload(None, torch.device("cpu"))
    contenders = {contender.name: contender for contender in workload.contenders}
    assert contenders["absent"].call is None
    assert contenders["absent"].reason == "why"
    expected = workload.truth()
    results = contenders["plain"].call()
    assert len(results) == len(expected)
    for result, right in zip(results, expected.values(), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-6)
