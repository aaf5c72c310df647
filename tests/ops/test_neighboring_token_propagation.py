"""Neighbouring-token propagation: a table as it is, whose gradient is (I + M) g, on every backend."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llava_st_ops import backends, neighboring_token_propagation, reference, use_backend
from llava_st_ops.ops.neighboring_token_propagation import _propagate
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned_results")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(100, 16), (1, 1), (2, 3), (7, 33), (9, 130), (257, 40), (0, 5), (5, 0)]


def definition(x: torch.Tensor) -> torch.Tensor:
    """(I + M) x by a dense product."""
    anchors = torch.arange(len(x), dtype=x.dtype, device=x.device)
    near = 0.5 ** (anchors[:, None] - anchors).abs()
    return x + near @ x


def skip_without_kernel(device: torch.device, dtype: torch.dtype) -> None:
    verdict = backends.can_run(backends.forced_backend(), "propagate_to_neighbors", device, dtype)
    if not verdict.ok:
        pytest.skip(verdict.reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_the_definition(on_backend, shape, dtype):
    skip_without_kernel(on_backend, dtype)
    generator = torch.Generator().manual_seed(0)
    table, grad = (torch.randn(shape, generator=generator).to(on_backend, dtype) for _ in range(2))
    table.requires_grad_()
    result = neighboring_token_propagation(table)
    assert torch.equal(result, table)
    (actual,) = torch.autograd.grad(result, table, grad)
    assert_accurate(actual, definition(grad.double()), reference.propagate_to_neighbors(grad), "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided(on_backend, dtype):
    """Gradients come as views: every other row, padded rows, transposed, expanded."""
    whole = torch.randn(20, 24).to(on_backend, dtype)
    for grad in (whole[::2], whole[:, 1:8], whole.T, whole[:1].expand(9, 24), whole[:, :1].expand(20, 7)):
        expected = definition(grad.double())
        assert_accurate(_propagate(grad), expected, reference.propagate_to_neighbors(grad))


def test_golden(on_backend):
    golden = load_file("tests/golden/ntp.safetensors")
    table = golden["table"].to(on_backend).requires_grad_()
    for compat in ("paper", "released"):
        result = neighboring_token_propagation(table, compat=compat)
        (grad,) = torch.autograd.grad(result, table, golden["upstream"].to(on_backend))
        torch.testing.assert_close(grad.cpu(), golden["grad"], rtol=0, atol=5e-6)
        if compat == "released":
            torch.testing.assert_close(result.detach().cpu(), golden["forward_fp32"], rtol=0, atol=1e-6)
            assert not torch.equal(result, table)


def test_differentiates_again_and_again(on_backend):
    table = torch.randn(6, 3, device=on_backend, requires_grad=True)
    grad = torch.randn(6, 3, device=on_backend, requires_grad=True)
    (first,) = torch.autograd.grad(neighboring_token_propagation(table), table, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, torch.ones_like(first))
    torch.testing.assert_close(second, definition(torch.ones_like(first)))


def test_transforms():
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    ones = torch.ones(6, 4, dtype=torch.float64)
    gradient = torch.func.grad(lambda table: (neighboring_token_propagation(table) * ones).sum())
    torch.testing.assert_close(gradient(x[0]), definition(ones))
    torch.testing.assert_close(torch.vmap(gradient)(x), definition(ones).expand(3, 6, 4))
    tangent = torch.func.jvp(neighboring_token_propagation, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, definition(x[1]))
    mapped = torch.vmap(torch.ops.llava_st.propagate_to_neighbors, in_dims=2, out_dims=2)(x.permute(1, 2, 0))
    torch.testing.assert_close(mapped[..., 1], definition(x[1]))


def test_compile():
    table = torch.randn(10, 8, requires_grad=True)
    step = lambda table: neighboring_token_propagation(table * 2).square()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True)
    (expected,) = torch.autograd.grad(step(table).sum(), table)
    (actual,) = torch.autograd.grad(compiled(table).sum(), table)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(on_backend, dtype):
    if backends.forced_backend() == "reference":
        pytest.skip("the reference is no op")
    skip_without_kernel(on_backend, dtype)
    namespace = backends.find_backend(backends.forced_backend()).namespace
    op = getattr(torch.ops, namespace).propagate_to_neighbors.default
    torch.library.opcheck(op, (torch.randn(7, 5).to(on_backend, dtype).requires_grad_(),))


def test_gradcheck_of_the_op():
    """It is linear; neighboring_token_propagation itself has a gradient that is not its derivative, on purpose."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.llava_st.propagate_to_neighbors, x)
    assert torch.autograd.gradgradcheck(torch.ops.llava_st.propagate_to_neighbors, x)


def test_the_same_bits_in_every_run(on_backend):
    grad = torch.randn(100, 200, device=on_backend)
    assert torch.equal(_propagate(grad), _propagate(grad))


def test_errors(on_backend):
    with pytest.raises(ValueError, match="neighboring_token_propagation: table must have 2 dimensions .*, got 1"):
        neighboring_token_propagation(torch.randn(3, device=on_backend))
    with pytest.raises(TypeError, match="table must be of a floating point dtype, got torch.int64"):
        neighboring_token_propagation(torch.ones(3, 3, device=on_backend, dtype=torch.int64))
    with pytest.raises(ValueError, match="compat must be 'paper' or 'released', got 'other'"):
        neighboring_token_propagation(torch.randn(3, 3, device=on_backend), compat="other")


def test_errors_of_the_raw_op():
    with pytest.raises(RuntimeError, match="propagate_to_neighbors: x must have 2 dimensions .*, got 3"):
        torch.ops.llava_st.propagate_to_neighbors(torch.randn(3, 3, 3))
    with pytest.raises(RuntimeError, match="propagate_to_neighbors: x must be float64, float32, .*, got"):
        torch.ops.llava_st.propagate_to_neighbors(torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="takes the PyTorch reference"):
        torch.func.grad(lambda x: torch.ops.llava_st.propagate_to_neighbors(x).sum())(torch.randn(3, 3))


def test_meta_tensors():
    with use_backend("cpu"):
        assert torch.ops.llava_st.propagate_to_neighbors(torch.empty(3, 4, device="meta")).shape == (3, 4)
