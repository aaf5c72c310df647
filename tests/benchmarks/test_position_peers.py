"""The baselines of LAPE and the coordinate loss compute what the reference does, and so do all contenders."""

from __future__ import annotations

import pytest
import torch

from benchmarks import position_workloads
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
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, (build, _) in position_workloads.builders(torch.device("cpu")).items():
        if name.startswith("coordinate"):
            continue  # its vocabulary is not small
        workload = build(None, torch.device("cpu"))
        truth = workload.truth()
        assert workload.baseline in [contender.name for contender in workload.contenders]
        for contender in workload.contenders:
            assert (contender.role == "yardstick") == (not contender.checked)
            if contender.checked:
                for result, expected in zip(contender.call(), truth.values(), strict=False):
                    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_losses_of_others_need_a_gpu():
    assert not any("hard labels" in name for name in position_workloads.builders(torch.device("cpu")))
