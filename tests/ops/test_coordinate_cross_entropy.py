"""The coordinate loss on every backend, against the reference in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llava_st_ops import coordinate_cross_entropy, reference, use_backend
from tests.position_cases import AXES, DTYPES, NAN, assert_matches, namespace, random, results, skip_without_kernel
from tests.reference.lape_cases import load_golden

pytestmark = pytest.mark.usefixtures("poisoned_results")
SOURCES = ("hidden", "weight", *AXES)
TOKENS = ("labels", "axis", "positions")
OP = "coordinate_cross_entropy"
REDUCTIONS = ["none", "mean", "sum", "per_sample_mean", "per_sample_sum"]


def problem(tokens, channels, words=37, dtype=torch.float32, device="cpu", table_dtype=None, seed=0):
    """Words, single anchors, coordinates of all axes and ignored tokens, in random order."""
    generator = torch.Generator().manual_seed(seed)

    def choose(low, high):
        return torch.randint(low, high, (tokens,), generator=generator)

    kind = choose(0, 3)
    axis = torch.where(kind == 1, choose(0, 3), -1).to(torch.int8)
    positions = torch.rand(tokens, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    positions[::3] = choose(0, 5)[::3].double() / 4
    labels = torch.where(kind == 2, -100, torch.where(kind == 1, -7, choose(0, words + 12)))  # -7 is not read
    shapes = [(tokens, channels), (words, channels), (5, channels), (4, channels), (3, channels)]
    dtypes = (dtype, dtype, *[table_dtype or dtype] * 3)
    sources = {name: random(shapes[i], i, dtypes[i], device) for i, name in enumerate(SOURCES)}
    values = (labels, axis, torch.where(axis < 0, NAN, positions))
    return {**sources, **{name: x.to(device) for name, x in zip(TOKENS, values, strict=True)}}


def bound(function, values, **options):
    return lambda *sources: function(**{**values, **dict(zip(SOURCES, sources, strict=True))}, **options)


def check(values, grad=None, **options):
    if options.get("reduction") == "none" and grad is None:
        grad = random(values["labels"].shape, 9, torch.float32, values["hidden"].device)
    grad = torch.ones((), device=values["hidden"].device) if grad is None else grad
    sources = [values[name] for name in SOURCES]
    ours, plain = (bound(f, values, **options) for f in (coordinate_cross_entropy, reference.coordinate_cross_entropy))
    assert_matches(ours, plain, sources, SOURCES, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(23, 16), (40, 7), (1, 1), (130, 40)])
def test_matches_reference(on_backend, tokens, channels, dtype):
    skip_without_kernel(OP, on_backend, dtype)
    check(problem(tokens, channels, dtype=dtype, device=on_backend, seed=tokens), reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(on_backend, reduction):
    values = problem(30, 8, device=on_backend)
    options = {"reduction": reduction}
    if reduction.startswith("per_sample"):
        options["sample"] = torch.arange(30, device=on_backend) // 7
    check(values, **options)
    if reduction == "mean":
        check(values, normalizer=3.5)
        check(values, normalizer=torch.tensor(5, device=on_backend))


@pytest.mark.parametrize("table_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(on_backend, dtype, table_dtype):
    check(problem(23, 16, dtype=dtype, device=on_backend, table_dtype=table_dtype), reduction="sum")


def test_tiles(on_backend):
    """More classes than a tile holds, and more tokens."""
    values = problem(4100, 2, words=2100, device=on_backend)
    values["labels"] = torch.where(values["labels"] == -100, 3, values["labels"])
    values["labels"][::5] = 2090
    check(values, reduction="mean")


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_integers_and_strides(on_backend, integers):
    values = problem(23, 16, device=on_backend)
    values["labels"] = values["labels"].to(integers)
    for name in TOKENS:
        values[name] = torch.stack((values[name], values[name]), 1)[:, 0]
    for name in SOURCES:
        values[name] = torch.cat((values[name], values[name]), 1)[:, 3:19]
    check(values)
    values["weight"] = values["weight"].T.contiguous().T
    check(values, reduction="none", grad=torch.ones((), device=on_backend))


def test_a_batch_of_samples(on_backend):
    """[B, L]: the sample of a token is its row."""
    flat = problem(24, 8, device=on_backend)
    batch = {name: x.view(3, 8, *x.shape[1:]) if name in ("hidden", *TOKENS) else x for name, x in flat.items()}
    sample = torch.arange(24, device=on_backend) // 8
    for reduction in REDUCTIONS:
        options = {"sample": sample} if reduction.startswith("per_sample") else {}
        expected = coordinate_cross_entropy(**flat, reduction=reduction, **options)
        actual = coordinate_cross_entropy(**batch, reduction=reduction)
        torch.testing.assert_close(actual.reshape(expected.shape), expected)
        assert actual.shape == ((3, 8) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_active_gives_zero(on_backend, tokens, reduction):
    values = problem(tokens, 8, device=on_backend)
    values["labels"] = torch.full_like(values["labels"], -100)
    values["axis"] = torch.full_like(values["axis"], 5)  # not read
    options = {"sample": torch.zeros(tokens, dtype=torch.int64, device=on_backend)} if "per" in reduction else {}
    if reduction == "mean":
        options["normalizer"] = 0
    sources = [values[name].requires_grad_() for name in SOURCES]
    loss = coordinate_cross_entropy(**values, reduction=reduction, **options)
    assert not loss.any()
    assert not loss.isnan().any()
    for grad in torch.autograd.grad(loss.sum(), sources):
        assert not grad.any()
        assert not grad.isnan().any()


@pytest.mark.parametrize("infinite", ["weight", "temporal"])
def test_impossible_classes(on_backend, infinite):
    """A class with logit -inf takes no part, be it in the first tile or in the last."""
    values = problem(23, 4, device=on_backend)
    values["hidden"] = values["hidden"].abs()
    values[infinite][2] = -torch.inf
    values["labels"] = torch.where(values["labels"] == -100, -100, 1)
    values["axis"] = torch.full_like(values["axis"], -1)
    loss = coordinate_cross_entropy(**values)
    torch.testing.assert_close(loss, reference.coordinate_cross_entropy(**values))
    assert loss.isfinite()


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), AXES, ("hidden", *AXES), ("weight", "temporal")])
def test_only_the_gradients_that_are_wanted(on_backend, wanted):
    """A frozen head, say."""
    values = problem(23, 8, device=on_backend)
    leaves = [values[name].requires_grad_() for name in wanted]
    actual = torch.autograd.grad(coordinate_cross_entropy(**values), leaves)
    expected = torch.autograd.grad(reference.coordinate_cross_entropy(**values), leaves)
    torch.testing.assert_close(actual, expected)


def test_golden(on_backend):
    tensors, config = load_golden("coordinate_loss")
    skip_without_kernel(OP, on_backend, torch.float64)
    labels = torch.nn.functional.pad(tensors["labels"], (0, 1), value=-100)[:, 1:]
    axis = torch.full(labels.shape, -1, dtype=torch.int8)
    positions = torch.full(labels.shape, NAN, dtype=torch.float64)
    for sample, variables in enumerate(config["variables"]):
        for number, name in enumerate(AXES):
            at = (tensors["labels"][sample] == config["token_ids"][f"{name}_output"]).nonzero().squeeze(1) - 1
            places = variables[f"{'' if name == 'temporal' else 'spatial_'}{name}_output_locations"][: len(at)]
            axis[sample, at], positions[sample, at] = number, torch.tensor(places, dtype=torch.float64)
    names = ("hidden", "lm_head", *(f"{name}_output" for name in AXES))
    leaves = [tensors[name].to(on_backend).requires_grad_() for name in names]
    tokens = [x.to(on_backend) for x in (labels, axis, positions)]
    loss = coordinate_cross_entropy(*leaves, *tokens, reduction="per_sample_sum")
    torch.testing.assert_close(loss.cpu(), tensors["loss"], rtol=0, atol=1e-11)
    each = [coordinate_cross_entropy(leaves[0][b], *leaves[1:], *(x[b] for x in tokens)) for b in range(len(labels))]
    torch.testing.assert_close(torch.stack(each).cpu(), tensors["per_sample_loss"], rtol=0, atol=1e-11)
    grads = torch.autograd.grad(loss, leaves)
    for name, grad in zip(names, grads, strict=True):
        if name in ("hidden", "lm_head"):
            torch.testing.assert_close(grad.cpu(), tensors[f"grad_{name}"], rtol=0, atol=1e-11)
        else:  # the published one is of the raw table
            expected = tensors[f"grad_{name}"]
            torch.testing.assert_close(reference.propagate_to_neighbors(grad.cpu()), expected, rtol=0, atol=1e-11)


def test_the_same_bits_in_every_run(on_backend):
    values = problem(50, 24, device=on_backend)
    sources = [values[name] for name in SOURCES]
    sample = torch.arange(50, device=on_backend) % 4
    run = bound(coordinate_cross_entropy, values, reduction="per_sample_sum", sample=sample)
    first, second = (results(run, sources, torch.ones((), device=on_backend)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def raw_calls(ops, dtype, device):
    values = problem(9, 8, dtype=dtype, device=device)
    arguments = [values[name] for name in (*SOURCES, *TOKENS)]
    losses, logsumexp = reference.coordinate_losses(*arguments)
    return {
        OP: (ops.coordinate_cross_entropy, arguments),
        f"{OP}_backward": (
            ops.coordinate_cross_entropy_backward,
            [torch.ones_like(losses), logsumexp, *arguments, -100, True, False, True],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [OP, f"{OP}_backward"])
def test_opcheck(on_backend, name, dtype):
    op, arguments = raw_calls(getattr(torch.ops, namespace()), dtype, on_backend)[name]
    if name == OP:
        arguments = [x.requires_grad_() if x.dtype == dtype else x for x in arguments]
    torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "per_sample_mean"])
def test_gradcheck(backend, reduction):
    values = problem(12, 3, words=6, dtype=torch.float64)
    options = {"sample": torch.arange(12) // 5} if "per" in reduction else {}
    with use_backend(backend):
        sources = [values[name].requires_grad_() for name in SOURCES]
        assert torch.autograd.gradcheck(
            bound(coordinate_cross_entropy, values, reduction=reduction, **options), sources
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(hidden, weight, temporal, height, width, *tokens):
        return coordinate_cross_entropy(hidden * 2, weight, temporal, height, width, *tokens) * 3

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (12, 15):
        values = problem(tokens, 8)
        sources, others = ([values[name] for name in names] for names in (SOURCES, TOKENS))
        actual = results(lambda *x, o=others: compiled(*x, *o), sources, torch.ones(()))
        torch.testing.assert_close(actual, results(lambda *x, o=others: step(*x, *o), sources, torch.ones(())))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_active_may_be_nan(compiled):
    """As padding can be. Compiled code does not leave it out, but masks it."""
    values = problem(20, 8)
    values["hidden"][values["labels"] == -100] = NAN
    leaves = [values[name].requires_grad_() for name in SOURCES]
    function = torch.compile(coordinate_cross_entropy, fullgraph=True) if compiled else coordinate_cross_entropy
    grads = torch.autograd.grad(function(**values), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    expected = torch.autograd.grad(reference.coordinate_cross_entropy(**values), leaves)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast(backend):
    values = problem(23, 16)
    lowered = {name: x.bfloat16() if name in SOURCES else x for name, x in values.items()}
    with use_backend(backend):
        expected = coordinate_cross_entropy(**lowered)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = coordinate_cross_entropy(**values)
            raw, _ = torch.ops.llava_st.coordinate_cross_entropy(*(values[n] for n in (*SOURCES, *TOKENS)))
    assert torch.equal(actual, expected)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(raw.sum() / (values["labels"] != -100).sum(), expected)


def test_transforms_take_the_reference():
    values = problem(9, 4, dtype=torch.float64)
    of = lambda f: lambda hidden: f(**{**values, "hidden": hidden})  # noqa: E731
    gradient = torch.func.grad(of(coordinate_cross_entropy))(values["hidden"])
    torch.testing.assert_close(gradient, torch.func.grad(of(reference.coordinate_cross_entropy))(values["hidden"]))


def test_double_backward_is_an_error_that_says_what_to_do():
    values = problem(9, 4, dtype=torch.float64)
    hidden = values["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(coordinate_cross_entropy(**values), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported.*use_backend"):
        grad.sum().backward()


def changed(name, at, value):
    values = problem(24, 6)
    values["labels"][:] = 1
    values["axis"][:] = -1
    values = {n: x.view(4, 6, *x.shape[1:]) if n in ("hidden", *TOKENS) else x for n, x in values.items()}
    for each, v in zip(name.split(), value if isinstance(value, tuple) else (value,), strict=True):
        values[each][at] = v
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("labels", (1, 2), 49), r"labels\[1, 2\] must be -100 or in \[0, 49\), got 49"),
        (changed("axis positions", (3, 5), (1, NAN)), r"positions\[3, 5\] must be a number where .*, got nan"),
        (changed("axis", (0, 1), 3), r"axis\[0, 1\] must be -1, 0, 1 or 2, got 3"),
    ],
)
def test_errors_name_sample_and_position(values, message):
    with pytest.raises(ValueError, match=f"^{OP}: {message}$"):
        coordinate_cross_entropy(**values)
    flat = [x.flatten(0, 1) if n in ("hidden", *TOKENS) else x for n, x in values.items()]
    with pytest.raises(RuntimeError, match=rf"{OP}: (labels|axis|positions)\[\d+\] must be"):
        torch.ops.llava_st.coordinate_cross_entropy(*flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, r"weight must have shape \[V, 6\], got \[9, 5\]"),
        ({"weight": torch.zeros(9, 6).double()}, "weight must have the dtype of hidden"),
        ({"height": torch.zeros(4, 6).double()}, "height must have the dtype of temporal"),
        ({"labels": torch.zeros(24)}, "labels must be int32 or int64, got torch.float32"),
        ({"axis": torch.zeros(23, dtype=torch.int8)}, r"axis must have shape \[24\], got \[23\]"),
        ({"reduction": "batchmean"}, "reduction must be one of none, mean, .*, got 'batchmean'"),
        ({"normalizer": 0.0}, "normalizer must be a positive number, got 0.0"),
        ({"normalizer": 3, "reduction": "sum"}, 'normalizer goes with reduction "mean" only'),
        ({"reduction": "per_sample_sum"}, 'reduction "per_sample_sum" needs sample'),
    ],
)
def test_errors(changes, message):
    values = {**problem(24, 6), **changes}
    with pytest.raises((ValueError, TypeError), match=f"^{OP}: {message}"):
        coordinate_cross_entropy(**values)


def test_meta_tensors():
    values = {name: x.to("meta") for name, x in problem(12, 8).items()}
    assert coordinate_cross_entropy(**values).shape == ()
    assert coordinate_cross_entropy(**values, reduction="none").shape == (12,)


_MEMORY = """
import resource, torch
from llava_st_ops import coordinate_cross_entropy
tokens, words, width = 600, 40000, 64
sources = [torch.randn(n, width).requires_grad_() for n in (tokens, words, 100, 100, 100)]
labels = torch.randint(0, words, (tokens,))
axis, positions = torch.full((tokens,), -1, dtype=torch.int8), torch.full((tokens,), float("nan"), dtype=torch.float64)
def step(n):
    for x in sources: x.grad = None
    coordinate_cross_entropy(sources[0][:n], *sources[1:], labels[:n], axis[:n], positions[:n]).backward()
step(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(tokens)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_stays_within_a_tile():
    """All logits of one dtype would be 92 MiB, with their gradients twice that; a tile has at most 32 MiB."""
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 60
