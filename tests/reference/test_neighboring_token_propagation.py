"""The gradient of neighbouring anchors: against the published vectors, and against the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llava_st_ops.reference import (
    neighboring_token_propagation,
    propagate_to_neighbors,
)
from tests.reference.lape_cases import (
    LOW_PRECISION,
    half_an_ulp,
    load_golden,
    random_table,
)


def neighbors(count):
    """`M`, entry by entry."""
    return torch.tensor([[2.0 ** -abs(i - j) for j in range(count)] for i in range(count)], dtype=torch.float64)


def test_golden_propagation():
    tensors, _ = load_golden("ntp")
    for compat in ("paper", "released"):
        table = tensors["table"].clone().requires_grad_()
        output = neighboring_token_propagation(table, compat=compat)
        output.backward(tensors["upstream"])
        torch.testing.assert_close(table.grad, tensors["grad"], rtol=0, atol=5e-6)
        expected = tensors["table" if compat == "paper" else "forward_fp32"]
        torch.testing.assert_close(output.detach(), expected, rtol=0, atol=1e-6 if compat == "released" else 0)
    propagated = propagate_to_neighbors(tensors["table"]) - tensors["table"]
    torch.testing.assert_close(propagated, tensors["propagated_fp32"], rtol=0, atol=5e-6)
    released = neighboring_token_propagation(tensors["table_bf16"], compat="released")
    assert torch.equal(released, tensors["forward_bf16"])
    assert not torch.equal(released, tensors["table_bf16"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(0, 3), st.sampled_from(["paper", "released"]))
def test_propagation_against_the_matrix(count, channels, compat):
    table, grad, tangent = (random_table(count, channels, seed) for seed in range(3))
    matrix = torch.eye(count, dtype=torch.float64) + neighbors(count).view(count, count)
    torch.testing.assert_close(propagate_to_neighbors(grad), matrix @ grad, rtol=0, atol=1e-13)
    leaf = table.clone().requires_grad_()
    output = neighboring_token_propagation(leaf, compat=compat)
    torch.testing.assert_close(output.detach(), table, rtol=0, atol=0 if compat == "paper" else 1e-14)
    (found,) = torch.autograd.grad(output, leaf, grad)
    torch.testing.assert_close(found, matrix @ grad, rtol=0, atol=1e-13)
    _, forward = torch.func.jvp(lambda x: neighboring_token_propagation(x, compat=compat), (table,), (tangent,))
    torch.testing.assert_close(forward, matrix @ tangent, rtol=0, atol=1e-13)


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_propagation_differentiates_again(compat):
    """The gradient is not that of the result, so it is itself what finite differences are taken of."""

    def gradient(table, grad):
        output = neighboring_token_propagation(table, compat=compat)
        return torch.autograd.grad(output, table, grad, create_graph=True)

    table, grad = (random_table(7, 2, seed).requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(gradient, (table, grad))
    assert torch.autograd.gradgradcheck(lambda x: neighboring_token_propagation(x, compat=compat), table, grad)
    assert torch.autograd.gradgradcheck(propagate_to_neighbors, table)
    matrix = torch.eye(7, dtype=torch.float64) + neighbors(7)
    jacobian = torch.func.jacrev(lambda x: neighboring_token_propagation(x, compat=compat))(table[:, :1])
    torch.testing.assert_close(jacobian.squeeze(), matrix)
    batched = torch.func.vmap(lambda x: neighboring_token_propagation(x, compat=compat))(table.expand(2, 7, 2))
    torch.testing.assert_close(batched, table.expand(2, 7, 2))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_propagation_in_low_precision(dtype):
    """The gradient is summed in float32; released rounds R, the sum and the difference."""
    table, grad = (random_table(100, 64, seed, dtype) for seed in range(2))
    matrix = neighbors(100)
    leaf = table.clone().requires_grad_()
    (found,) = torch.autograd.grad(neighboring_token_propagation(leaf), leaf, grad)
    exact = grad.double() + matrix @ grad.double()
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= half_an_ulp(exact, dtype)).all()
    propagated = (matrix @ table.double()).to(dtype)
    released = neighboring_token_propagation(table, compat="released")
    assert (released != (table + propagated) - propagated).sum() <= 6  # where R lies between two numbers
    assert not torch.equal(released, table)
    table[0, 0] = -0.0
    assert torch.equal(neighboring_token_propagation(table).view(torch.int16), table.view(torch.int16))


def test_propagation_takes_linear_time():
    class Work(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            for tensor in results if isinstance(results, (list, tuple)) else [results]:
                self.elements += tensor.numel()
            return results

    def work(count):
        with Work() as mode:
            propagate_to_neighbors(torch.ones(count, 3))
        return mode.elements

    assert 0 < work(800) <= 2.1 * work(400)
