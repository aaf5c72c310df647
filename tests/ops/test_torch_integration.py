"""What torch asks of an op besides its result: schemas, fakes, autograd, compile, autocast, transforms."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llava_st_ops
from llava_st_ops import point_to_region_attention, point_to_region_attention_packed, reference, use_backend
from tests.attention_cases import Case, dense_reference, gradients, random_bias

CASE = Case(2, (3, 4, 5), (2, 3, 3), 2, 8)
GRIDS = torch.tensor([[2, 3, 4], [1, 5, 3]])
REGION = (1, 3, 3)


def packed_inputs(dtype=torch.float32):
    tokens = int(GRIDS.prod(1).sum())
    queries = sum(t * -(-h // 3) * -(-w // 3) for t, h, w in GRIDS.tolist())
    return [torch.randn(rows, 2, 8, dtype=dtype) for rows in (queries, tokens, tokens)]


def random_biases(name, dtype):
    shape = packed_inputs()[1].shape[:-1] if name.startswith("packed") else CASE.key_shape[:-1]
    return random_bias(shape, torch.Generator().manual_seed(0)).to(dtype)


def raw_calls(dtype, requires_grad, ops=torch.ops.llava_st):
    """Every raw op with arguments: (op, arguments)."""
    dense = [x.requires_grad_(requires_grad) for x in CASE.inputs(dtype)]
    packed = [x.requires_grad_(requires_grad) for x in packed_inputs(dtype)]
    return {
        "dense": (ops.point_to_region_attention, (*dense, list(CASE.region))),
        "packed": (ops.point_to_region_attention_packed, (*packed, GRIDS, list(REGION))),
        "dense_backward": (
            ops.point_to_region_attention_backward,
            (torch.randn(CASE.query_shape, dtype=dtype), *CASE.inputs(dtype), list(CASE.region)),
        ),
        "packed_backward": (
            ops.point_to_region_attention_packed_backward,
            (torch.randn_like(packed[0]), *packed_inputs(dtype), GRIDS, list(REGION)),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "packed", "dense_backward", "packed_backward"])
def test_opcheck(name, dtype):
    op, arguments = raw_calls(dtype, requires_grad=not name.endswith("backward"))[name]
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(op, arguments, {"scale": 0.5})
    bias = random_biases(name, dtype).requires_grad_(not name.endswith("backward"))
    torch.library.opcheck(op, arguments, {"bias": bias})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    with use_backend(backend):
        inputs = [x.requires_grad_() for x in CASE.inputs(torch.float64)]
        assert torch.autograd.gradcheck(lambda *x: point_to_region_attention(*x, CASE.region, 0.4), inputs)
        inputs = [x.requires_grad_() for x in packed_inputs(torch.float64)]
        assert torch.autograd.gradcheck(lambda *x: point_to_region_attention_packed(*x, GRIDS, REGION), inputs)


def test_raw_op_differentiates():
    inputs = CASE.inputs(torch.float64)
    grad_output = torch.randn(CASE.query_shape, dtype=torch.float64)
    raw = gradients(lambda *x: torch.ops.llava_st.point_to_region_attention(*x, CASE.region), inputs, grad_output)
    expected = gradients(dense_reference(CASE.region), inputs, grad_output)
    torch.testing.assert_close(raw, expected, rtol=1e-12, atol=1e-12)


# The reference with dynamic shapes compiles too, in minutes of symbolic arithmetic.
@pytest.mark.parametrize(("backend", "dynamic"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_compile(backend, dynamic):
    def step(query, key, value):
        return point_to_region_attention(query * 2, key, value, CASE.region).square()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with use_backend(backend):
        for seed in (0, 1):
            inputs = CASE.inputs(torch.float32, seed=seed)
            grad_output = torch.randn(CASE.query_shape)
            eager = gradients(step, inputs, grad_output)
            torch.testing.assert_close(gradients(compiled, inputs, grad_output), eager)


def test_compile_packed():
    def step(query, key, value, grids):
        return point_to_region_attention_packed(query, key, value, grids, REGION) * 3

    inputs = packed_inputs()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, GRIDS), step(*inputs, GRIDS))


def targets_of_compiled(step, *arguments):
    """The call targets in the graph that Dynamo makes of `step` now, recompiling where its guards say so."""
    seen = []

    def capture(graph, _):
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    return torch.compile(step, fullgraph=True, backend=capture), seen


def test_compiled_code_follows_the_forced_backend():
    inputs = CASE.inputs(torch.float32)
    compiled, graphs = targets_of_compiled(lambda *x: point_to_region_attention(*x, CASE.region))
    compiled(*inputs)
    assert "llava_st.point_to_region_attention" in graphs[-1]
    with use_backend("reference"):
        compiled(*inputs)
    assert len(graphs) == 2
    assert "llava_st" not in graphs[-1]
    compiled(*inputs)
    assert len(graphs) == 2, "the first graph serves again"


def test_backend_forced_inside_compiled_code():
    def step(*inputs):
        with use_backend("reference"):
            forced = point_to_region_attention(*inputs, CASE.region)
        return forced, point_to_region_attention(*inputs, CASE.region)

    compiled, graphs = targets_of_compiled(step)
    forced, native = compiled(*CASE.inputs(torch.float32))
    assert graphs[-1].count("llava_st.point_to_region_attention") == 1
    torch.testing.assert_close(forced, native)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_its_dtype(backend, dtype):
    inputs = CASE.inputs(torch.float32)
    lowered = [x.to(dtype) for x in inputs]
    with use_backend(backend):
        expected = point_to_region_attention(*lowered, CASE.region)
        with torch.autocast("cpu", dtype=dtype):
            output = point_to_region_attention(*inputs, CASE.region)
            packed = point_to_region_attention_packed(*packed_inputs(), GRIDS, REGION)
            double = point_to_region_attention(*CASE.inputs(torch.float64), CASE.region)
    assert torch.equal(output, expected)
    assert packed.dtype == dtype
    assert double.dtype == torch.float64


def test_autocast_unifies_dtypes():
    query, key, value = CASE.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = point_to_region_attention(query.bfloat16(), key, value, CASE.region)
    assert output.dtype == torch.bfloat16


def test_autocast_gives_gradients_in_the_dtype_of_the_inputs():
    leaves = [x.requires_grad_() for x in CASE.inputs(torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = point_to_region_attention(*leaves, CASE.region)
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


def test_vmap_dense_and_packed():
    batch = [torch.stack([CASE.inputs(torch.float64, seed=s)[i] for s in range(3)], dim=i) for i in range(3)]
    mapped = torch.vmap(lambda *x: point_to_region_attention(*x, CASE.region), in_dims=(0, 1, 2))(*batch)
    for seed in range(3):
        expected = point_to_region_attention(*CASE.inputs(torch.float64, seed=seed), CASE.region)
        torch.testing.assert_close(mapped[seed], expected)

    query, key, value = packed_inputs(torch.float64)
    queries = torch.stack([query, 2 * query])
    mapped = torch.vmap(lambda q: point_to_region_attention_packed(q, key, value, GRIDS, REGION))(queries)
    torch.testing.assert_close(mapped[1], point_to_region_attention_packed(2 * query, key, value, GRIDS, REGION))


def test_vmap_over_nothing():
    inputs = [torch.stack([x, x])[:0] for x in CASE.inputs(torch.float32)]
    mapped = torch.vmap(lambda *x: point_to_region_attention(*x, CASE.region))(*inputs)
    assert mapped.shape == (0, *CASE.query_shape)


def test_vmap_over_grids_is_an_error():
    inputs = packed_inputs()
    op = torch.ops.llava_st.point_to_region_attention_packed
    with pytest.raises(NotImplementedError, match="grid_thw"):
        torch.vmap(lambda grids: op(*inputs, grids, list(REGION)))(torch.stack([GRIDS, GRIDS]))


@pytest.mark.parametrize("transform", ["jvp", "grad", "jacrev", "vmap of grad", "grad of vmap", "hessian", "dual"])
def test_transforms_are_right(transform):
    case = Case(1, (2, 3, 3), (1, 3, 3), 1, 2)
    query, key, value = case.inputs(torch.float64)

    def through(function):
        of = lambda q: function(q, key, value, case.region)  # noqa: E731
        total = lambda q: of(q).square().sum()  # noqa: E731
        if transform == "jvp":
            return torch.func.jvp(of, (query,), (torch.ones_like(query),))[1]
        if transform == "dual":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
                return torch.autograd.forward_ad.unpack_dual(of(dual)).tangent
        if transform == "vmap of grad":
            return torch.vmap(torch.func.grad(total))(torch.stack([query, -query]))
        if transform == "grad of vmap":
            return torch.func.grad(lambda q: torch.vmap(total)(q).sum())(torch.stack([query, -query]))
        return getattr(torch.func, transform)(total if transform != "jacrev" else of)(query)

    expected = through(reference.point_to_region_attention)
    assert expected.abs().max() > 0
    torch.testing.assert_close(through(point_to_region_attention), expected)


@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.grad])
def test_raw_op_refuses_transforms_that_it_would_get_wrong(transform):
    query, key, value = CASE.inputs(torch.float32)
    of = lambda q: torch.ops.llava_st.point_to_region_attention(q, key, value, CASE.region).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="takes the PyTorch reference"):
        transform(of, (query,), (query,)) if transform is torch.func.jvp else transform(of)(query)


def test_double_backward_is_an_error_that_says_what_to_do():
    inputs = [x.requires_grad_() for x in CASE.inputs(torch.float64)]
    output = point_to_region_attention(*inputs, CASE.region)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported.*use_backend"):
        grad.sum().backward()


def test_reference_differentiates_twice():
    case = Case(1, (1, 2, 3), (1, 2, 2), 1, 2)
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *x: point_to_region_attention(*x, case.region), inputs)


@pytest.mark.parametrize("function", [point_to_region_attention, torch.ops.llava_st.point_to_region_attention])
def test_meta_tensors_get_shapes_only(function):
    inputs = [x.to("meta") for x in CASE.inputs(torch.float32)]
    output = function(*inputs, CASE.region)
    assert output.device.type == "meta"
    assert output.shape == CASE.query_shape


def test_fake_tensors_get_shapes_only():
    real = packed_inputs()
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in real]
        output = point_to_region_attention_packed(*inputs, mode.from_tensor(GRIDS), REGION)
    assert output.shape == inputs[0].shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_under_compile_need_the_reference(backend):
    query, key, value = CASE.inputs(torch.float64)
    gradient = torch.func.grad(lambda q: point_to_region_attention(q, key, value, CASE.region).square().sum())
    with use_backend("reference"):
        compiled = torch.compile(gradient, backend=backend, fullgraph=True)(query)
    torch.testing.assert_close(compiled, gradient(query))


def test_checkpointing_and_saved_tensor_hooks():
    inputs = [x.requires_grad_() for x in CASE.inputs(torch.float64)]
    run = lambda *x: point_to_region_attention(*x, CASE.region)  # noqa: E731
    checkpointed = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    grads = torch.autograd.grad(checkpointed.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(run(*inputs).sum(), inputs))


def test_public_names():
    for name in llava_st_ops.__all__:
        assert getattr(llava_st_ops, name) is not None
