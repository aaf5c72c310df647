"""LAPE and the coordinate loss on a GPU: what waits for nothing, graphs, tokens that nobody checks, float16's range."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import coordinate_cross_entropy, lape_add, lape_add_packed, lape_scatter, use_backend
from tests.ops.test_coordinate_cross_entropy import SOURCES
from tests.ops.test_coordinate_cross_entropy import problem as loss_problem
from tests.ops.test_lape_add import inputs_of
from tests.ops.test_lape_scatter import NAMES
from tests.ops.test_lape_scatter import problem as scatter_problem
from tests.position_cases import NAN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def steps():
    """Functions of no arguments that run an op and its gradient on the GPU."""
    features = [x.requires_grad_() for x in inputs_of((1, 20, 9, 9), 512, (100, 100, 100), torch.bfloat16, "cuda")]
    grid_thw = torch.tensor([[20, 9, 9]], device="cuda")
    packed = [features[0].detach().flatten(0, 3).requires_grad_(), *features[1:]]
    tokens = scatter_problem(200, 512, torch.bfloat16, "cuda")
    sources = [tokens[name].requires_grad_() for name in NAMES]
    labels = loss_problem(200, 512, 1000, torch.bfloat16, "cuda")
    classes = [labels[name].requires_grad_() for name in SOURCES]

    def with_gradient(function, leaves):
        def step():
            output = function()
            return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

        return step

    return {
        "lape_add": with_gradient(lambda: lape_add(*features), features),
        "lape_add_packed": with_gradient(lambda: lape_add_packed(*packed, grid_thw), packed),
        "lape_scatter": with_gradient(lambda: lape_scatter(**tokens), sources),
        "coordinate_cross_entropy": with_gradient(lambda: coordinate_cross_entropy(**labels), classes),
    }


@pytest.mark.parametrize("name", ["lape_add", "lape_add_packed", "lape_scatter"])
def test_the_host_waits_for_nothing(kernel, name):
    step = steps()[name]
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["lape_add", "lape_add_packed", "lape_scatter", "coordinate_cross_entropy"])
def test_cuda_graph_replays_forward_and_backward(kernel, name):
    step = steps()[name]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    for replayed, wanted in zip(results, expected, strict=True):
        # The loss leaves out what is not active when it may wait, and so computes products of another size.
        torch.testing.assert_close(replayed, wanted, rtol=2e-2, atol=1e-3)


def test_tokens_that_do_not_exist_are_rows_of_nan(kernel):
    values = scatter_problem(40, 64, torch.float32, "cuda")
    expected = lape_scatter(**values)
    values["visual_index"][3] = 99
    values["input_ids"][5], values["axis"][5], values["visual_index"][5] = 10**6, -1, -1
    values["axis"][7], values["positions"][7], values["visual_index"][7] = 1, NAN, -1
    output = lape_scatter(**values)
    wrong = torch.zeros(40, dtype=torch.bool, device="cuda")
    wrong[[3, 5, 7]] = True
    assert output[wrong].isnan().all()
    assert torch.equal(output[~wrong], expected[~wrong])


def test_labels_that_do_not_exist_are_a_loss_of_nan(kernel):
    values = loss_problem(20, 64, device="cuda")
    values["labels"][2], values["axis"][2] = 10**6, -1
    losses = coordinate_cross_entropy(**values, reduction="none")
    assert losses[2].isnan()
    assert losses[torch.arange(20, device="cuda") != 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_of_many_classes(kernel, dtype):
    """A class among many has a gradient of some 1e-9, which float16 does not hold."""
    values = loss_problem(512, 256, 50000, dtype, "cuda")
    leaves = [values[name].requires_grad_() for name in SOURCES]
    grads = torch.autograd.grad(coordinate_cross_entropy(**values), leaves)
    wide = {name: x.detach().double().requires_grad_() if name in SOURCES else x for name, x in values.items()}
    with use_backend("reference"):
        exact = torch.autograd.grad(coordinate_cross_entropy(**wide), [wide[name] for name in SOURCES])
    for name, grad, expected in zip(SOURCES, grads, exact, strict=True):
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps, name
