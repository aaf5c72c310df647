"""lape_scatter on every backend, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import lape_scatter, reference, use_backend
from llava_st_ops.ops.lape_scatter import scatter_plan
from tests.position_cases import AXES, DTYPES, NAN, assert_matches, namespace, random, results, skip_without_kernel

pytestmark = pytest.mark.usefixtures("poisoned_results")
NAMES = ("embed", *AXES, "visual")
TOKENS = ("input_ids", "axis", "positions", "visual_index")


def problem(tokens, channels, dtype=torch.float32, device="cpu", rows=(11, 5, 4, 3, 7), table_dtype=None, seed=0):
    """A batch of words, anchors, coordinates of all axes and visual tokens, in random order and with repetitions."""
    generator = torch.Generator().manual_seed(seed)

    def choose(low, high, dtype):
        return torch.randint(low, high, (tokens,), generator=generator).to(dtype)

    kind = choose(0, 3, torch.int64)
    axis = torch.where(kind == 1, choose(0, 3, torch.int64), -1).to(torch.int8)
    positions = torch.rand(tokens, generator=generator, dtype=torch.float64) * 1.4 - 0.2  # some outside of [0, 1]
    positions[::3] = choose(0, 5, torch.float64)[::3] / 4  # some at anchors
    visual_index = torch.where(kind == 2, choose(0, rows[4], torch.int64), -1)
    ids = torch.where(kind == 0, choose(0, sum(rows[:4]), torch.int64), -7)  # what does not count may be anything
    shapes = [(count, channels) for count in rows]
    dtypes = (dtype, *[table_dtype or dtype] * 3, dtype)
    sources = {name: random(shapes[i], i, dtypes[i], device) for i, name in enumerate(NAMES)}
    values = (ids, axis, torch.where(axis < 0, NAN, positions), visual_index)
    return {**sources, **{name: x.to(device) for name, x in zip(TOKENS, values, strict=True)}}


def bound(function, values):
    """`function` of the five tensors that have a gradient."""
    return lambda *sources: function(**{**values, **dict(zip(NAMES, sources, strict=True))})


def check(values, grad="random"):
    if isinstance(grad, str):
        shape = (*values["input_ids"].shape, values["embed"].shape[1])
        grad = random(shape, 9, values["embed"].dtype, values["embed"].device)
    sources = [values[name] for name in NAMES]
    assert_matches(bound(lape_scatter, values), bound(reference.lape_scatter, values), sources, NAMES, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(40, 40), (7, 5), (150, 16), (1, 1), (30, 520)])
def test_matches_reference(on_backend, tokens, channels, dtype):
    skip_without_kernel("lape_scatter", on_backend, dtype)
    check(problem(tokens, channels, dtype, on_backend, seed=tokens))


@pytest.mark.parametrize("table_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(on_backend, dtype, table_dtype):
    check(problem(40, 24, dtype, on_backend, table_dtype=table_dtype))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_integers_and_strides(on_backend, integers):
    values = problem(40, 16, torch.float32, on_backend)
    for name in ("input_ids", "visual_index"):
        values[name] = values[name].to(integers)
    for name in TOKENS:
        values[name] = torch.stack((values[name], values[name]), 1)[:, 0]
    for name in NAMES:
        values[name] = torch.cat((values[name], values[name]), 1)[:, 3:19]
    check(values)
    values["embed"] = values["embed"].T.contiguous().T  # a last dimension that is not contiguous
    values["visual"] = values["visual"][:1].expand(7, 16)
    check(values, grad=torch.ones((), device=on_backend))


def test_one_row_for_many_tokens(on_backend):
    """As padding has it: the sums are those of float32, in the order of tokens."""
    values = problem(300, 8, torch.bfloat16, on_backend)
    values["input_ids"] = torch.where(values["input_ids"] >= 0, 3, values["input_ids"])
    values["visual_index"] = torch.where(values["visual_index"] >= 0, 2, -1)
    check(values)


def test_a_batch_has_the_shape_of_its_ids(on_backend):
    flat = problem(24, 8, torch.float32, on_backend)
    batch = {name: x.view(2, 12) if name in TOKENS else x for name, x in flat.items()}
    assert torch.equal(lape_scatter(**batch), lape_scatter(**flat).view(2, 12, 8))


def test_rows_are_taken_to_the_bit(on_backend):
    values = problem(60, 8, torch.float32, on_backend)
    output = lape_scatter(**values)
    visual, axis, ids = values["visual_index"], values["axis"], values["input_ids"]
    assert torch.equal(output[visual >= 0], values["visual"][visual[visual >= 0]])
    text = (visual < 0) & (axis < 0)
    rows = torch.cat([values[name] for name in NAMES[:4]])
    assert torch.equal(output[text], rows[ids[text]])
    values["height"][1:] = torch.inf  # next to the anchor that positions of 0 take
    values["axis"] = torch.where(axis >= 0, 1, axis).to(torch.int8)
    values["positions"] = torch.zeros_like(values["positions"])
    output = lape_scatter(**values)
    assert torch.equal(output[(axis >= 0) & (visual < 0)], values["height"][:1].expand(int((axis >= 0).sum()), 8))


@pytest.mark.parametrize(("tokens", "channels", "visuals"), [(0, 8, 3), (5, 0, 3), (0, 8, 0)])
def test_empty(on_backend, tokens, channels, visuals):
    values = problem(tokens, channels, torch.float32, on_backend)
    values["visual"] = values["visual"][:visuals]
    values["visual_index"] = values["visual_index"].clamp(max=visuals - 1)
    check(values)


def test_text_alone_needs_no_visual_tokens(on_backend):
    values = problem(20, 8, torch.float32, on_backend)
    keep = values["visual_index"] < 0
    values = {name: x[keep] if name in TOKENS else x for name, x in values.items()}
    check({**values, "visual": values["visual"][:0]})


def test_the_same_bits_in_every_run(on_backend):
    values = problem(200, 40, torch.float32, on_backend)
    sources = [values[name] for name in NAMES]
    grad = random((200, 40), 3, device=on_backend)
    first, second = (results(bound(lape_scatter, values), sources, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def raw_calls(ops, dtype, device):
    values = problem(12, 8, dtype, device)
    sources = [values[name] for name in NAMES]
    plan = scatter_plan([len(x) for x in sources], *(values[name] for name in TOKENS))
    forward = [*sources[:4], *(values[name] for name in TOKENS), sources[4]]
    return {
        "lape_scatter": (ops.lape_scatter, forward),
        "lape_scatter_backward": (
            ops.lape_scatter_backward,
            [random((12, 8), 5, dtype, device), *plan, *sources],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lape_scatter", "lape_scatter_backward"])
def test_opcheck(on_backend, name, dtype):
    op, arguments = raw_calls(getattr(torch.ops, namespace()), dtype, on_backend)[name]
    if name == "lape_scatter":
        arguments = [x.requires_grad_() if x.dtype == dtype else x for x in arguments]
    torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    values = problem(14, 2, torch.float64)
    with use_backend(backend):
        sources = [values[name].requires_grad_() for name in NAMES]
        assert torch.autograd.gradcheck(bound(lape_scatter, values), sources)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(embed, temporal, height, width, visual, *tokens):
        return lape_scatter(embed * 2, temporal, height, width, *tokens, visual).square()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (12, 15):
        values = problem(tokens, 8)
        sources, others = ([values[name] for name in names] for names in (NAMES, TOKENS))
        grad = random((tokens, 8), 4)
        actual = results(lambda *x, o=others: compiled(*x, *o), sources, grad)
        torch.testing.assert_close(actual, results(lambda *x, o=others: step(*x, *o), sources, grad))


def test_plan_of_tokens_that_a_gpu_would_not_check():
    """What does not exist gets no gradient."""
    ids = torch.tensor([-1, 99, 3, 3, 3])
    axis = torch.tensor([-1, -1, 7, 1, -1], dtype=torch.int8)
    positions = torch.tensor([0, 0, 0, NAN, 0], dtype=torch.float64)
    visual_index = torch.tensor([-1, -1, -1, -1, 4])
    destination, _, _ = scatter_plan([5, 4, 4, 4, 2], ids, axis, positions, visual_index)
    assert (destination == 5 + 12 + 2).all()


def changed(name, at, value, shape=(4, 10)):
    values = problem(40, 6)
    values["axis"][:] = 0
    values["positions"][:] = 0.5
    values["visual_index"][:] = -1
    values["axis"][8] = -1
    values["input_ids"][8] = 1
    values = {n: x.view(shape) if n in TOKENS else x for n, x in values.items()}
    values[name][at] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("visual_index", (2, 3), 7), r"visual_index\[2, 3\] must be -1 or in \[0, 7\), got 7"),
        (changed("positions", (1, 9), NAN), r"positions\[1, 9\] must be a number where axis names a table, got nan"),
        (changed("axis", (3, 0), 3), r"axis\[3, 0\] must be -1, 0, 1 or 2, got 3"),
        (changed("input_ids", (0, 8), 23), r"input_ids\[0, 8\] must be in \[0, 23\), got 23"),
    ],
)
def test_errors_name_sample_and_position(values, message):
    with pytest.raises(ValueError, match=f"^lape_scatter: {message}$"):
        lape_scatter(**values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embed", torch.zeros(3), r"embed must have .*\[V, C\]"),
        ("temporal", torch.zeros(3, 7), r"temporal must have shape \[3, 6\], got \[3, 7\]"),
        ("width", torch.zeros(3, 6).double(), "width must have the dtype of temporal"),
        ("input_ids", torch.zeros(40), "input_ids must be int32 or int64, got torch.float32"),
        ("axis", torch.zeros(40), "axis must be int8, got torch.float32"),
        ("axis", torch.zeros(41, dtype=torch.int8), r"axis must have shape \[40\], got \[41\]"),
        ("positions", torch.zeros(40), "positions must be float64, got torch.float32"),
        ("visual_index", torch.zeros(40), "visual_index must be int32 or int64, got torch.float32"),
        ("visual", torch.zeros(3, 6).half(), "visual must have the dtype of embed"),
        ("visual", torch.zeros(3, 5), r"visual must have shape \[\w, 6\], got \[3, 5\]"),
    ],
)
def test_errors(name, value, message):
    values = {**problem(40, 6), name: value}
    with pytest.raises((ValueError, TypeError), match=f"^lape_scatter: {message}"):
        lape_scatter(**values)
    raw = [values[n] for n in (*NAMES[:4], *TOKENS, "visual")]
    with pytest.raises(RuntimeError, match=f"lape_scatter: {message.replace('torch.', '')}"):
        torch.ops.llava_st.lape_scatter(*raw)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("visual_index", 3, 7, (40,)), r"visual_index\[3\] must be -1 or in \[0, 7\), got 7"),
        (changed("positions", 9, NAN, (40,)), r"positions\[9\] must be a number where axis names a table, got nan"),
        (changed("axis", 30, 3, (40,)), r"axis\[30\] must be -1, 0, 1 or 2, got 3"),
        (changed("input_ids", 8, -1, (40,)), r"input_ids\[8\] must be in \[0, 23\), got -1"),
    ],
)
def test_the_raw_cpu_op_checks_tokens_too(values, message):
    with pytest.raises(RuntimeError, match=f"lape_scatter: {message}"):
        torch.ops.llava_st.lape_scatter(*(values[n] for n in (*NAMES[:4], *TOKENS, "visual")))


def test_meta_tensors():
    values = {name: x.to("meta") for name, x in problem(12, 8).items()}
    assert lape_scatter(**values).shape == (12, 8)
