"""LAPE's addition on every backend, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_st_ops import backends, lape_add, lape_add_, lape_add_packed, reference, use_backend
from tests.position_cases import AXES, DTYPES, assert_matches, namespace, random, results, skip_without_kernel
from tests.reference.lape_cases import load_golden

pytestmark = pytest.mark.usefixtures("poisoned_results")
NAMES = ("features", *AXES)
LAPE = (100, 100, 100)

# Grid [B, T, H, W], channels, rows of the tables.
CASES = [
    ((2, 3, 4, 5), 40, (7, 9, 6)),
    ((1, 20, 9, 9), 16, LAPE),
    ((2, 1, 27, 27), 24, LAPE),  # images
    ((1, 9, 27, 11), 264, (9, 27, 11)),  # tables of the size of the grid; more than one tile of channels
    ((1, 12, 3, 17), 7, (5, 2, 1)),  # more patches than anchors, and rows that are no whole vectors
    ((3, 1, 1, 1), 1, (1, 1, 1)),
    ((1, 2, 70, 1), 8, (3, 4, 5)),
    ((1, 2, 1, 70), 8, (3, 4, 5)),
]
EMPTY = [((0, 2, 3, 4), 8), ((1, 0, 3, 4), 8), ((1, 2, 0, 4), 8), ((1, 2, 3, 0), 8), ((1, 2, 3, 4), 0)]
GRIDS = [[3, 4, 5], [1, 2, 2], [0, 3, 3], [9, 1, 6], [1, 27, 27]]


def inputs_of(grid, channels, counts, dtype, device, table_dtype=None):
    shapes = ((*grid, channels), *((count, channels) for count in counts))
    dtypes = (dtype, *[table_dtype or dtype] * 3)
    return [random(shape, seed, each, device) for seed, (shape, each) in enumerate(zip(shapes, dtypes, strict=True))]


def check(inputs, grad="random", **options):
    if isinstance(grad, str):
        grad = random(inputs[0].shape, 9, inputs[0].dtype, inputs[0].device)
    assert_matches(
        lambda *x: lape_add(*x, **options), lambda *x: reference.lape_add(*x, **options), inputs, NAMES, grad
    )


def check_packed(inputs, grid_thw, grad=None, **options):
    grad = random(inputs[0].shape, 9, inputs[0].dtype, inputs[0].device) if grad is None else grad
    assert_matches(
        lambda *x: lape_add_packed(*x, grid_thw, **options),
        lambda *x: reference.lape_add_packed(*x, grid_thw, **options),
        inputs,
        NAMES,
        grad,
    )


def assert_rounded_alike(actual, expected):
    """But for a few entries, where what is rounded lies within an ulp of float32 of the middle between two numbers."""
    assert actual.dtype == expected.dtype
    if actual.dtype in (torch.bfloat16, torch.float16):
        assert (actual != expected).float().mean() < 5e-3
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=64 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "channels", "counts"), CASES, ids=str)
def test_matches_reference(on_backend, grid, channels, counts, dtype):
    skip_without_kernel("lape_add", on_backend, dtype)
    check(inputs_of(grid, channels, counts, dtype, on_backend))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 2), *[st.integers(1, 9)] * 3),
    channels=st.integers(1, 20),
    counts=st.tuples(*[st.integers(1, 12)] * 3),
    text_aligned=st.booleans(),
)
def test_any_shape(on_backend, grid, channels, counts, text_aligned):
    check(inputs_of(grid, channels, counts, torch.float32, on_backend), text_aligned=text_aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_aligned(on_backend, dtype):
    skip_without_kernel("lape_add", on_backend, dtype)
    inputs = inputs_of((1, 3, 9, 5), 16, (7, 100, 30), dtype, on_backend)
    check(inputs, text_aligned=True)
    zero = [torch.zeros_like(x) for x in inputs]
    rows = lape_add(zero[0], zero[1], inputs[2], zero[3], text_aligned=True)[0, 0, :, 0]
    centres = (torch.arange(9, dtype=torch.float64, device=on_backend) + 0.5) / 9
    torch.testing.assert_close(rows, reference.interpolate_rows(inputs[2], centres))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_after_every_addition(on_backend, dtype):
    """As published: to the bit what plain PyTorch gives in that dtype."""
    skip_without_kernel("lape_add", on_backend, dtype)
    inputs = inputs_of((1, 5, 4, 6), 40, (9, 7, 6), dtype, on_backend)
    rounded = lape_add(*inputs, round_every_addition=True)
    expected = reference.lape_add(*inputs, round_every_addition=True)
    assert_rounded_alike(rounded, expected)
    if dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(rounded, lape_add(*inputs))


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(on_backend, dtype, table_dtype):
    inputs = inputs_of((1, 3, 4, 5), 24, (5, 6, 3), dtype, on_backend, table_dtype)
    if table_dtype != torch.float64:
        return check(inputs)
    grad = random(inputs[0].shape, 9, dtype, on_backend)
    for actual, expected in zip(
        results(lape_add, inputs, grad), results(reference.lape_add, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # computed in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", ["permuted", "last dimension", "unaligned", "expanded", "sliced"])
def test_strided(on_backend, view, dtype):
    features, *tables = inputs_of((2, 3, 4, 5), 16, (4, 5, 6), dtype, on_backend)
    features = {
        "permuted": lambda x: x.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4),
        "last dimension": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
        "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
        "expanded": lambda x: x[:1, :, :1].expand(x.shape),
        "sliced": lambda x: torch.cat((x, x), 3)[:, :, :, 2:7],
    }[view](features)
    strided = [torch.cat((table, table), 1)[:, 1:17] for table in tables]
    check([features, *strided], grad=features.detach())
    check([features, *tables], grad=torch.ones((), device=on_backend, dtype=dtype))  # as of .sum()
    expected = lape_add(features, *tables)
    if view != "expanded":
        assert lape_add_(features, *tables) is features
        assert torch.equal(features, expected)


def test_anchors_are_taken_to_the_bit(on_backend):
    """Where a patch sits at an anchor the next one does not count, whatever it holds."""
    features, temporal, height, width = inputs_of((1, 3, 4, 5), 16, (5, 4, 5), torch.float32, on_backend)
    temporal[[1, 3]] = math.inf  # three frames sit at anchors 0, 2 and 4
    output = lape_add(features, temporal, height, width)
    expected = ((features + height[:, None]) + width) + temporal[::2, None, None]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ["lape_inject_video", "lape_inject_image"])
def test_golden(on_backend, name):
    tensors, _ = load_golden(name)
    injected = tensors["injected"].to(on_backend)
    tables = [(tensors[f"{axis}_input"] + tensors[f"{axis}_output"]).to(on_backend) / 2 for axis in AXES]
    features = tensors["features"].to(on_backend).view(1, -1, 27, 27, 4)
    torch.testing.assert_close(lape_add(features, *tables).view(injected.shape), injected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("grid", "channels"), EMPTY, ids=str)
def test_empty(on_backend, grid, channels):
    inputs = inputs_of(grid, channels, (3, 2, 4), torch.float32, on_backend)
    check(inputs)
    assert lape_add_(inputs[0], *inputs[1:]).shape == inputs[0].shape


@pytest.mark.parametrize("options", [{}, {"text_aligned": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(on_backend, dtype, options):
    skip_without_kernel("lape_add_packed", on_backend, dtype)
    grid_thw = torch.tensor(GRIDS, dtype=torch.int32 if options else torch.int64)
    inputs = inputs_of((int(grid_thw.prod(1).sum()),), 24, (6, 11, 9), dtype, on_backend)
    check_packed(inputs, grid_thw, **options)
    rounded = lape_add_packed(*inputs, grid_thw, round_every_addition=True, **options)
    expected = reference.lape_add_packed(*inputs, grid_thw, round_every_addition=True, **options)
    assert_rounded_alike(rounded, expected)


def test_packed_strided_and_empty(on_backend):
    grid_thw = torch.tensor(GRIDS[:2] + GRIDS[2:4])
    features, *tables = inputs_of((int(grid_thw.prod(1).sum()),), 7, (6, 11, 9), torch.float32, on_backend)
    wide = torch.cat((features, features), 1)[:, 3:10]
    check_packed([wide, *tables], torch.cat((grid_thw, grid_thw), 1)[:, 3:], grad=wide[:, :1].expand(wide.shape))
    none = torch.zeros(0, 3, dtype=torch.int64)
    check_packed([features[:0], *tables], none)


@pytest.mark.parametrize("grad", ["all", "features", "tables"])
def test_only_the_gradients_that_are_wanted(on_backend, grad):
    inputs = inputs_of((1, 2, 3, 4), 8, (3, 4, 5), torch.float32, on_backend)
    wanted = {"all": inputs, "features": inputs[:1], "tables": inputs[1:]}[grad]
    for x in wanted:
        x.requires_grad_()
    upstream = random(inputs[0].shape, 5, device=on_backend)
    grads = torch.autograd.grad(lape_add(*inputs), wanted, upstream)
    expected = torch.autograd.grad(reference.lape_add(*inputs), wanted, upstream)
    torch.testing.assert_close(grads, expected)
    if grad != "tables":
        assert torch.equal(grads[0], upstream)


def test_the_same_bits_in_every_run(on_backend):
    inputs = inputs_of((2, 7, 9, 9), 300, (20, 30, 10), torch.float32, on_backend)
    grad = random(inputs[0].shape, 3, device=on_backend)
    first, second = (results(lape_add, inputs, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_same_bits_with_any_number_of_threads():
    inputs = inputs_of((2, 7, 9, 9), 600, (20, 30, 10), torch.float32, "cpu")
    grad = random(inputs[0].shape, 3)
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        by_all = results(lape_add, inputs, grad)
        try:
            torch.set_num_threads(1)
            by_one = results(lape_add, inputs, grad)
        finally:
            torch.set_num_threads(threads)
    assert all(map(torch.equal, by_all, by_one))


def raw_calls(ops, dtype, device="cpu"):
    dense = inputs_of((1, 2, 3, 4), 8, (3, 4, 5), dtype, device)
    packed = [dense[0].flatten(0, 3), *dense[1:]]
    grid_thw = torch.tensor([[2, 3, 4]])
    return {
        "lape_add": (ops.lape_add, dense),
        "lape_add_packed": (ops.lape_add_packed, [*packed, grid_thw]),
        "lape_add_backward": (ops.lape_add_backward, dense),
        "lape_add_packed_backward": (ops.lape_add_packed_backward, [*packed, grid_thw]),
        "lape_add_": (ops.lape_add_, dense),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lape_add", "lape_add_packed", "lape_add_backward", "lape_add_packed_backward"])
def test_opcheck(on_backend, name, dtype):
    op, arguments = raw_calls(getattr(torch.ops, namespace()), dtype, on_backend)[name]
    if not name.endswith("backward"):
        arguments = [x.requires_grad_() if x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(op, tuple(arguments))
    torch.library.opcheck(op, tuple(arguments), {"text_aligned": True})


def test_opcheck_in_place(on_backend):
    op, arguments = raw_calls(getattr(torch.ops, namespace()), torch.float32, on_backend)["lape_add_"]
    # Its autograd rule is to refuse: what is checked is the schema, that the fake fits, and functionalization.
    torch.library.opcheck(
        op, tuple(arguments), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    dense = [x.requires_grad_() for x in inputs_of((1, 2, 3, 2), 2, (4, 3, 5), torch.float64, "cpu")]
    packed = [dense[0].detach().flatten(0, 3).requires_grad_(), *dense[1:]]
    grids = torch.tensor([[2, 1, 3], [1, 3, 2]])
    with use_backend(backend):
        for aligned in (False, True):
            assert torch.autograd.gradcheck(lambda *x, a=aligned: lape_add(*x, text_aligned=a), dense)
            assert torch.autograd.gradcheck(lambda *x, a=aligned: lape_add_packed(*x, grids, text_aligned=a), packed)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(*inputs):
        return lape_add(inputs[0] * 2, *inputs[1:]).square()

    def in_place(*inputs):
        return lape_add_(inputs[0] * 2, *inputs[1:]) + 1

    compiled, compiled_in_place = (torch.compile(f, fullgraph=True, dynamic=dynamic) for f in (step, in_place))
    for frames in (2, 3):
        inputs = inputs_of((1, frames, 3, 4), 8, (3, 4, 5), torch.float32, "cpu")
        grad = random(inputs[0].shape, 4)
        torch.testing.assert_close(results(compiled, inputs, grad), results(step, inputs, grad))
        torch.testing.assert_close(compiled_in_place(*inputs), in_place(*inputs))


def test_transforms_take_the_reference():
    inputs = inputs_of((1, 2, 3, 2), 2, (4, 3, 5), torch.float64, "cpu")
    total = lambda add: lambda table: add(inputs[0], table, *inputs[2:]).square().sum()  # noqa: E731
    gradient = torch.func.grad(total(lape_add))(inputs[1])
    torch.testing.assert_close(gradient, torch.func.grad(total(reference.lape_add))(inputs[1]))
    with pytest.raises(NotImplementedError, match="takes the PyTorch reference"):
        torch.func.grad(total(torch.ops.llava_st.lape_add))(inputs[1])


def test_double_backward_is_an_error_that_says_what_to_do():
    inputs = [x.requires_grad_() for x in inputs_of((1, 2, 3, 2), 2, (4, 3, 5), torch.float64, "cpu")]
    (grad,) = torch.autograd.grad(lape_add(*inputs).square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported.*use_backend"):
        grad.sum().backward()


def test_in_place_has_no_gradient_and_is_seen_by_autograd(on_backend):
    features, *tables = inputs_of((1, 2, 3, 2), 4, (4, 3, 5), torch.float32, on_backend)
    with pytest.raises(RuntimeError, match="lape_add_.*has no gradient; lape_add has one"):
        lape_add_(features, tables[0].clone().requires_grad_(), *tables[1:])
    factor = torch.ones_like(features, requires_grad=True)
    product = features * factor  # keeps features for its gradient
    lape_add_(features, *tables)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.no_grad():
        lape_add_(features, tables[0].clone().requires_grad_(), *tables[1:])


X, TABLE, PACKED = torch.zeros(1, 2, 3, 4, 6), torch.zeros(5, 6), torch.zeros(24, 6)
BAD = [
    ({"features": X[0]}, r"features must have 5 dimensions \[B, T, H, W, C\], got 4"),
    ({"features": X.int()}, "features must be .*, got .*int32"),
    ({"temporal": TABLE[0]}, r"temporal must have 2 dimensions \[anchors, C\], got 1"),
    ({"height": torch.zeros(5, 7)}, r"height must have shape \[5, 6\], got \[5, 7\]"),
    ({"width": TABLE[:0]}, r"width must have at least one row, got \[0, 6\]"),
    ({"width": TABLE.double()}, r"width must have the dtype of temporal, .*float32, got .*float64"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_errors(on_backend, changes, message):
    arguments = {"features": X, "temporal": TABLE, "height": TABLE, "width": TABLE, **changes}
    arguments = {name: tensor.to(on_backend) for name, tensor in arguments.items()}
    for function in (lape_add, lape_add_):
        with pytest.raises((ValueError, TypeError), match=f"^{function.__name__}: {message}"):
            function(**arguments)
    raw = getattr(torch.ops, namespace()).lape_add
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"lape_add: {message}"):
        raw(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": PACKED[0]}, r"features must have 2 dimensions \[tokens, C\], got 1"),
        ({"grid_thw": torch.zeros(1, 2).long()}, r"grid_thw must have shape \[videos, 3\] .*, got \[1, 2\]"),
        ({"grid_thw": torch.zeros(1, 3)}, "grid_thw must be int32 or int64, got .*float32"),
        ({"grid_thw": torch.tensor([[2, 3, 5]])}, "grid_thw must add up to the 24 tokens of features"),
        ({"grid_thw": torch.tensor([[1, 2, 3]])}, "grid_thw must add up to the 24 tokens of features, got 6"),
        ({"grid_thw": torch.tensor([[-1, -4, 6]])}, r"grid_thw must not be negative, got \[-1, -4, 6\] for video 0"),
    ],
)
def test_errors_of_the_packed_form(on_backend, changes, message):
    arguments = {"features": PACKED, "temporal": TABLE, "height": TABLE, "width": TABLE}
    arguments = {name: tensor.to(on_backend) for name, tensor in {**arguments, **changes}.items()}
    arguments["grid_thw"] = changes.get("grid_thw", torch.tensor([[2, 3, 4]]))
    with pytest.raises((ValueError, TypeError), match=f"^lape_add_packed: {message}"):
        lape_add_packed(**arguments)
    of_contents = "grid_thw" in changes and "must have" not in message and "must be int" not in message
    if of_contents and backends.forced_backend() != "cpu":
        return  # nothing is read back from a device, and the emulator takes all tensors to be on one
    raw = getattr(torch.ops, namespace()).lape_add_packed
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"lape_add_packed: {message}"):
        raw(*arguments.values())


def test_in_place_needs_memory_of_its_own(on_backend):
    with pytest.raises(RuntimeError, match="expanded|more than one element of the written-to tensor"):
        lape_add_(X.to(on_backend)[:, :1].expand(1, 2, 3, 4, 6), *[TABLE.to(on_backend)] * 3)


def test_out_of_memory_has_its_own_type():
    one = torch.zeros(1, 1, 1, 1, 1).expand(2**40, 2**20, 1, 1, 1)
    with use_backend("cpu"), pytest.raises(torch.OutOfMemoryError, match="out of memory allocating the output"):
        lape_add(one, *[torch.zeros(1, 1)] * 3)


def test_meta_tensors():
    meta = [x.to("meta") for x in (X, TABLE, TABLE, TABLE)]
    assert lape_add(*meta).shape == X.shape
    assert lape_add_(*meta).shape == X.shape
    assert lape_add_packed(PACKED.to("meta"), *meta[1:], torch.tensor([[2, 3, 4]])).shape == PACKED.shape
