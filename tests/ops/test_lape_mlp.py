"""lape_mlp, and the two ops that it is made of, on every backend and dtype."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn.functional import gelu, linear

from llava_st_ops import lape_mlp, reference, use_backend
from tests.emulator.backend import emulated, launched
from tests.position_cases import DTYPES, NAN, assert_matches, namespace, random, skip_without_kernel
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned_results")
# Grid, channels in, hidden channels of one MLP, channels out, number of MLPs.
CASES = [
    ((2, 3, 2, 4), 16, 8, 24, 2),
    ((1, 1, 5, 3), 7, 5, 3, 1),  # rows that are no whole vectors
    ((1, 2, 1, 1), 8, 20, 1, 3),
]
NAMES = ("features", "weight", "bias", "temporal", "height", "width")


def inputs_of(case, dtype=torch.float64, device="cpu", positions=None) -> list[torch.Tensor]:
    grid, inner, hidden, out, count = case
    sizes = [(count * hidden,), *((size, count * hidden) for size in grid[1:])]
    wide = [random(size, seed=i + 2, dtype=positions or dtype, device=device) for i, size in enumerate(sizes)]
    second = [random((out, hidden), seed=10 + i, dtype=dtype, device=device) for i in range(count)]
    biases = [random((out,), seed=20 + i, dtype=dtype, device=device) for i in range(count)]
    features, weight = random((*grid, inner), dtype=dtype, device=device), random((count * hidden, inner), 1)
    return [features, (weight / inner**0.5).to(device, dtype), *wide, *second, *biases]


def plain(*tensors):
    """By the definition, as one tensor. What goes into the GELU is rounded, as where every layer is one of torch's."""
    features, weight, bias, t, h, w, *second = tensors
    count = len(second) // 2
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    positions = bias.to(wide) + t.to(wide)[:, None, None] + h.to(wide)[:, None] + w.to(wide)
    hidden = gelu((linear(features, weight).to(wide) + positions).to(features.dtype)).chunk(count, -1)
    return torch.cat([linear(x, a, b) for x, a, b in zip(hidden, second[:count], second[count:], strict=True)], -1)


def op(*tensors):
    features, weight, bias, t, h, w, *second = tensors
    count = len(second) // 2
    return torch.cat(lape_mlp(features, weight, bias, (t, h, w), second[:count], second[count:]), -1)


def check(inputs):
    count = (len(inputs) - 6) // 2
    names = (*NAMES, *(f"second_weights[{i}]" for i in range(count)), *(f"second_biases[{i}]" for i in range(count)))
    output = plain(*inputs)
    assert_matches(op, plain, inputs, names, random(output.shape, 9, output.dtype, output.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(on_backend, case, dtype):
    skip_without_kernel("linear_lape_gelu", on_backend, dtype)
    check(inputs_of(case, dtype, on_backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_positions(on_backend, dtype):
    check(inputs_of(CASES[0], dtype, on_backend, positions=torch.float32))


def test_strided_features(on_backend):
    inputs = inputs_of(CASES[0], torch.float32, on_backend)
    check([inputs[0].transpose(1, 3).contiguous().transpose(1, 3), *inputs[1:]])
    check([inputs[0].transpose(1, 4).contiguous().transpose(1, 4), *inputs[1:]])


def test_an_empty_batch(on_backend):
    grid, *rest = CASES[0]
    inputs = inputs_of(((0, *grid[1:]), *rest), torch.float32, on_backend)
    leaves = [x.requires_grad_() for x in inputs]
    output = op(*leaves)
    assert output.shape == (0, *grid[1:], 48)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("wanted", range(10))
def test_each_gradient_alone(wanted):
    inputs = inputs_of(CASES[0])
    expected_of = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    output = plain(*expected_of)
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, expected_of[wanted], grad)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    (actual,) = torch.autograd.grad(op(*leaves), leaves[wanted], grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_keeps_features_and_preactivations_alone():
    case = ((1, 4, 6, 6), 16, 32, 24, 2)
    leaves = [x.requires_grad_() for x in inputs_of(case, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lape_mlp(*leaves[:3], leaves[3:6], leaves[6:8], leaves[8:])
    tokens = 4 * 6 * 6
    assert sorted(x.numel() // tokens for x in kept if x.numel() >= tokens * 16) == [16, 64]


def test_backward_in_another_thread_takes_the_same_backend():
    """As autograd's threads of devices do."""
    leaves = [x.requires_grad_() for x in inputs_of(CASES[0], torch.float32)]
    with emulated("threads"):
        output = op(*leaves)
    with launched() as names:
        thread = threading.Thread(target=lambda: output.sum().backward())
        thread.start()
        thread.join()
    assert any("gelu_gradient" in name for name in names)


# The two ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_lape_gelu(on_backend, dtype, keep):
    skip_without_kernel("linear_lape_gelu", on_backend, dtype)
    ops = getattr(torch.ops, namespace())
    arguments = inputs_of(CASES[0], dtype, on_backend)[:6]
    actual = ops.linear_lape_gelu(*arguments, keep)
    exact = reference.linear_lape_gelu(*(x.double() for x in arguments), keep)
    same = reference.linear_lape_gelu(*arguments, keep)
    assert_accurate(actual[0], exact[0], same[0], "activation")
    assert actual[1].shape == exact[1].shape
    if keep:
        assert_accurate(actual[1], exact[1], same[1], "preactivation")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_linear_gradient(on_backend, dtype):
    """Of a slice of columns, too."""
    skip_without_kernel("gelu_linear_gradient", on_backend, dtype)
    ops = getattr(torch.ops, namespace())
    grad, weight = (random(shape, i, dtype, on_backend) for i, shape in enumerate(((12, 6), (6, 16))))
    wide = random((12, 40), 5, dtype, on_backend) * 3
    for before in (wide[:, :16].contiguous(), wide[:, 8:24], wide[:, 3:19]):
        actual = ops.gelu_linear_gradient(grad, weight, before)
        exact = reference.gelu_linear_gradient(grad.double(), weight.double(), before.double())
        same = reference.gelu_linear_gradient(grad, weight, before)
        for name, *triple in zip(("gradient", "activation"), actual, exact, same, strict=True):
            assert_accurate(*triple, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gelu_far_out(on_backend, dtype):
    """The whole range: the tails vanish, without NaN; NaN stays NaN, and infinities give what torch gives."""
    skip_without_kernel("linear_lape_gelu", on_backend, dtype)
    ops = getattr(torch.ops, namespace())
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([1e30, -1e30, NAN, float("inf"), -float("inf")])])
    x = x.to(on_backend, dtype).reshape(-1, 1)
    one = torch.ones(1, 1, dtype=dtype, device=on_backend)
    gradient, activation = ops.gelu_linear_gradient(torch.ones_like(x), one, x)
    exact = x.double().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(gelu(exact).sum(), exact)
    computing = 4e-7 if dtype == torch.float32 else 1e-15
    for name, found, right in (("gelu", activation, gelu(exact).detach()), ("derivative", gradient, wanted)):
        error = (found.double() - right).abs() / right.abs().clamp_min(1)
        assert torch.equal(found.isnan(), right.isnan()), name
        assert error[right.isfinite()].max() < computing, name
    zeros = [torch.zeros(n, 1, dtype=dtype, device=on_backend) for n in (1, 1, len(x))]
    forward, _ = ops.linear_lape_gelu(x.view(1, 1, 1, -1, 1), one, zeros[0][0], *zeros, False)
    torch.testing.assert_close(forward.flatten(), activation.flatten(), equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(on_backend, dtype):
    ops = getattr(torch.ops, namespace())
    arguments = inputs_of(CASES[0], dtype, on_backend)[:6]
    torch.library.opcheck(ops.linear_lape_gelu, arguments)
    torch.library.opcheck(ops.linear_lape_gelu, (*arguments, True))
    tensors = [random(shape, i, dtype, on_backend) for i, shape in enumerate(((12, 6), (6, 16), (12, 16)))]
    torch.library.opcheck(ops.gelu_linear_gradient, tensors)


def test_the_ops_have_no_gradient():
    arguments = [x.requires_grad_() for x in inputs_of(CASES[0])[:6]]
    with pytest.raises(RuntimeError, match="has no gradient; llava_st_ops.lape_mlp has one"):
        torch.ops.llava_st.linear_lape_gelu(*arguments)


# What torch asks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    with use_backend(backend):
        inputs = [x.requires_grad_() for x in inputs_of(((1, 2, 1, 2), 2, 2, 1, 2))]
        assert torch.autograd.gradcheck(op, inputs)


def test_forward_mode_takes_the_reference():
    inputs = tuple(inputs_of(CASES[0]))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    found, wanted = torch.func.jvp(op, inputs, tangents), torch.func.jvp(plain, inputs, tangents)
    torch.testing.assert_close(found, wanted)


def test_twice_takes_the_reference():
    leaves = [x.requires_grad_() for x in inputs_of(((1, 2, 1, 1), 2, 2, 1, 1))]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(op, leaves)
    leaves = [x.requires_grad_() for x in inputs_of(CASES[0])]
    (grad,) = torch.autograd.grad(op(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile(backend):
    compiled = torch.compile(op, fullgraph=True)
    found = []
    with use_backend(backend):
        for function in (compiled, op):
            leaves = [x.requires_grad_() for x in inputs_of(CASES[0], torch.float32)]
            output = function(*leaves)
            found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_autocast():
    """Products in the dtype of autocast, positions as they are."""
    inputs = inputs_of(CASES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*inputs)
    low = [x if 2 <= i < 6 else x.bfloat16() for i, x in enumerate(inputs)]
    assert torch.equal(found, op(*low))


def changed(**changes):
    names = ("features", "weight", "bias", "temporal", "height", "width")
    arguments = dict(zip(names, inputs_of(CASES[0], torch.float32)[:6], strict=True))
    return list({**arguments, **changes}.values())


BAD = [
    ({"features": torch.randn(3, 16)}, ValueError, "features must have 5 dimensions", "got 2"),
    ({"weight": torch.randn(16, 15)}, ValueError, r"weight must have shape \[16, 16\]", r"got \[16, 15\]"),
    ({"weight": torch.randn(16, 16).half()}, TypeError, "weight must have the dtype of features", "float16"),
    ({"bias": torch.randn(15)}, ValueError, r"bias must have shape \[16\]", r"got \[15\]"),
    ({"bias": torch.randn(16).half()}, TypeError, "bias must have the dtype of temporal", "float16"),
    ({"temporal": torch.randn(4, 16)}, ValueError, r"temporal must have shape \[3, 16\]", r"got \[4, 16\]"),
    ({"height": torch.randn(2, 15)}, ValueError, r"height must have shape \[2, 16\]", r"got \[2, 15\]"),
    ({"width": torch.randn(4, 16).half()}, TypeError, "width must have the dtype of temporal", "float16"),
]


@pytest.mark.parametrize(("change", "error", "expected", "found"), BAD)
def test_errors(change, error, expected, found):
    features, weight, bias, *positions = changed(**change)
    second = [torch.randn(24, 8) for _ in range(2)], [torch.randn(24) for _ in range(2)]
    with pytest.raises(error, match=f"linear_lape_gelu: {expected}.*{found}"):
        lape_mlp(features, weight, bias, positions, *second)
    with pytest.raises(RuntimeError, match=f"{expected}.*{found}"):
        torch.ops.llava_st.linear_lape_gelu(features, weight, bias, *positions)


def test_errors_of_second_layers():
    inputs = inputs_of(CASES[0], torch.float32)
    first = (*inputs[:3], inputs[3:6])
    with pytest.raises(ValueError, match="must be as many, and divide the 16 rows of weight, got 3 and 2"):
        lape_mlp(*first, [*inputs[6:8], inputs[6]], inputs[8:])
    with pytest.raises(ValueError, match=r"each of second_weights must have shape \[24, 8\], got \[24, 7\]"):
        lape_mlp(*first, [inputs[6], inputs[7][:, :7]], inputs[8:])
    with pytest.raises(RuntimeError, match=r"grad_output must have shape \[5, 2\].*got \[5, 3\]"):
        torch.ops.llava_st.gelu_linear_gradient(torch.randn(5, 3), torch.randn(2, 4), torch.randn(5, 4))
