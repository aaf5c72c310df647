"""The coordinate loss: against the published vectors, and against loops that share no code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_st_ops.reference import coordinate_cross_entropy, neighboring_token_propagation
from tests.reference.lape_cases import AXES, LOW_PRECISION, NAN, coordinates, load_golden, random_table

TENSORS = ("hidden", "weight", *AXES)
REDUCTIONS = ("none", "mean", "sum", "per_sample_mean", "per_sample_sum")


def golden_targets(tensors, config):
    """Labels, axes and positions of all samples, shifted: what follows each hidden state but the last."""
    columns = []
    for labels, variables in zip(tensors["labels"], config["variables"], strict=True):
        axis, positions = coordinates(labels, {**config, "variables": [variables]}, kinds=("output",))
        columns.append([labels[1:], axis[1:], positions[1:]])
    return [torch.stack(column) for column in zip(*columns, strict=True)]


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_loss(dtype, compat):
    tensors, config = load_golden("coordinate_loss")
    names = ("hidden", "lm_head", *(f"{axis}_output" for axis in AXES))
    hidden, weight, *raw = (tensors[name].to(dtype).requires_grad_() for name in names)
    tables = [neighboring_token_propagation(table, compat=compat) for table in raw]
    labels, axis, positions = golden_targets(tensors, config)
    assert [int(((labels != -100) & (axis == a)).sum()) for a in range(3)] == [6, 6, 4]
    sample = torch.arange(4).repeat_interleave(39)
    shifted = hidden[:, :-1].flatten(0, 1)
    targets = [x.flatten() for x in (labels, axis, positions)]
    loss = coordinate_cross_entropy(shifted, weight, *tables, *targets, reduction="per_sample_sum", sample=sample)
    assert loss.dtype == dtype
    grads = torch.autograd.grad(loss, [hidden, weight, *raw])

    def assert_close(actual, expected):
        bound = 1e-11 if dtype == torch.float64 else 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)

    assert_close(loss, tensors["loss"])
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, tensors[f"grad_{name}"])
    for i, expected in enumerate(tensors["per_sample_loss"]):
        one = [x[i] for x in (labels, axis, positions)]
        assert_close(coordinate_cross_entropy(hidden[i, :-1], weight, *tables, *one), expected)
    loss = coordinate_cross_entropy(shifted, weight, *tables, *targets, reduction="per_sample_mean", sample=sample)
    assert_close(4 * loss, tensors["loss"])


@st.composite
def loss_problem(draw):
    """Arguments in float64, some tokens ignored, each other one a word, an anchor or a coordinate."""
    words, n, m, k = (draw(st.integers(1, 5)) for _ in range(4))
    tokens, channels = draw(st.integers(0, 10)), draw(st.integers(0, 4))
    many = {"min_size": tokens, "max_size": tokens}
    ignored = draw(st.sampled_from([-100, -1, 0]))
    labels = draw(st.lists(st.integers(0, words + n + m + k - 1) | st.just(ignored), **many))
    axis = draw(st.lists(st.integers(-1, 2), **many))
    places = draw(st.lists(st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.5, 1.0]), **many))
    sample = draw(st.lists(st.integers(0, 3), **many))
    sizes = (tokens, words, n, m, k)
    return {
        **{name: random_table(size, channels, i) for i, (name, size) in enumerate(zip(TENSORS, sizes, strict=True))},
        "labels": torch.tensor(labels, dtype=draw(st.sampled_from([torch.int32, torch.int64]))),
        "axis": torch.tensor(axis, dtype=torch.int8),
        "positions": torch.tensor(places, dtype=torch.float64).masked_fill(torch.tensor(axis).reshape(-1) < 0, NAN),
        "ignore_index": ignored,
        "sample": torch.tensor(sample, dtype=torch.int64),
    }


def loop_loss(problem):
    """The loss of each token, and its gradients of the hidden state and of all classes, by dense targets."""
    numbers = {name: problem[name].detach().double().numpy() for name in TENSORS}
    classes = np.concatenate([numbers[name] for name in TENSORS[1:]])
    columns = [problem[name].tolist() for name in ("labels", "axis", "positions")]
    losses, grads = [], []
    for h, label, axis, position in zip(numbers["hidden"], *columns, strict=True):
        target = np.zeros(len(classes))
        if label == problem["ignore_index"]:
            losses.append(None)
            grads.append((np.zeros_like(h), np.zeros_like(classes)))
            continue
        if axis < 0:
            target[label] = 1
        else:
            first = sum(len(numbers[name]) for name in TENSORS[1 : axis + 2])
            anchor = min(max(position, 0), 1) * (len(numbers[AXES[axis]]) - 1)
            target[first + math.ceil(anchor)] += anchor - math.floor(anchor)
            target[first + math.floor(anchor)] += 1 - (anchor - math.floor(anchor))
        logits = classes @ h
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        losses.append(-(target * np.log(shares)).sum())
        grads.append((classes.T @ (shares - target), np.outer(shares - target, h)))
    return losses, grads


def loop_weights(losses, sample, reduction):
    """By what each token's loss is multiplied in the result."""
    active = [loss is not None for loss in losses]
    if reduction in ("none", "sum"):
        return [float(a) for a in active]
    if reduction == "mean":
        return [a / max(sum(active), 1) for a in active]
    weights = [
        a / max(sum(b for b, t in zip(active, sample, strict=True) if s == t), 1)
        for a, s in zip(active, sample, strict=True)
    ]
    return weights if reduction == "per_sample_sum" else [weight / (max(sample) + 1) for weight in weights]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(loss_problem(), st.sampled_from(REDUCTIONS))
def test_loss_and_gradients_against_loops(problem, reduction):
    inputs = [problem[name].requires_grad_() for name in TENSORS]
    result = coordinate_cross_entropy(**problem, reduction=reduction)
    losses, token_grads = loop_loss(problem)
    weights = loop_weights(losses, problem["sample"].tolist(), reduction)
    terms = [weight * (loss or 0.0) for weight, loss in zip(weights, losses, strict=True)]
    expected = torch.tensor(terms if reduction == "none" else math.fsum(terms), dtype=torch.float64)
    torch.testing.assert_close(result.detach(), expected, rtol=0, atol=1e-12)
    grad = (
        torch.arange(1.0, 1 + len(losses), dtype=torch.float64) if reduction == "none" else torch.tensor(3.0).double()
    )
    hidden_grad, *class_grads = torch.autograd.grad(result, inputs, grad)
    scales = np.array(weights) * grad.numpy()
    for row, scale, (expected_row, _) in zip(hidden_grad, scales, token_grads, strict=True):
        torch.testing.assert_close(row, torch.from_numpy(scale * expected_row), rtol=0, atol=1e-11)
    actual = torch.cat(class_grads)
    total = sum(
        (scale * per_class for scale, (_, per_class) in zip(scales, token_grads, strict=True)), np.zeros(actual.shape)
    )
    torch.testing.assert_close(actual, torch.from_numpy(total), rtol=0, atol=1e-11)


def arguments(dtype=torch.float64, **changes):
    """Nine words and three tables of 4; a word, three coordinates, an ignored token, an anchor and a word."""
    problem = {
        **{
            name: random_table(size, 6, size + i, dtype)
            for i, (name, size) in enumerate(zip(TENSORS, (7, 9, 4, 4, 4), strict=True))
        },
        "labels": torch.tensor([3, 0, 0, 0, -100, 20, 8]),
        "axis": torch.tensor([-1, 0, 1, 2, -1, -1, -1], dtype=torch.int8),
        "positions": torch.tensor([NAN, 0.1, 0.5, 0.8, NAN, NAN, NAN], dtype=torch.float64),
    }
    return {**problem, **changes}


def changed(name, at, value):
    tensor = arguments()[name].clone()
    tensor[at] = value
    return {name: tensor}


def test_words_alone_are_plain_cross_entropy():
    problem = arguments(axis=torch.full((7,), -1, dtype=torch.int8))
    logits = problem["hidden"] @ torch.cat([problem[name] for name in TENSORS[1:]]).T
    for reduction in ("none", "mean", "sum"):
        expected = torch.nn.functional.cross_entropy(logits, problem["labels"], reduction=reduction)
        actual = coordinate_cross_entropy(**problem, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_what_does_not_count_is_not_read():
    expected = coordinate_cross_entropy(**arguments())
    for changes in (
        changed("labels", 2, 999),  # the label of a coordinate
        changed("positions", 0, 0.3),  # that of a word
        changed("positions", 4, 0.3),
        changed("axis", 4, 2),  # an ignored coordinate, without a position
        changed("axis", 4, 7),
        changed("hidden", 4, torch.inf),
    ):
        assert torch.equal(coordinate_cross_entropy(**arguments(**changes)), expected)


@pytest.mark.parametrize("position", [-0.1, -torch.inf, 0.0, -0.0, 1 / 3, 2 / 3, 1.0, 1.2, torch.inf])
def test_a_position_at_an_anchor_is_the_label_of_that_anchor(position):
    problem = arguments(**changed("positions", 2, position))
    anchor = round(3 * min(max(position, 0), 1))
    labels, axis = problem["labels"].clone(), problem["axis"].clone()
    labels[2], axis[2] = 9 + 4 + anchor, -1
    expected = coordinate_cross_entropy(**{**problem, "labels": labels, "axis": axis}, reduction="none")
    torch.testing.assert_close(coordinate_cross_entropy(**problem, reduction="none"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_active_token_gives_zero_and_zero_gradients(reduction, tokens):
    problem = {name: t[:tokens] if name not in TENSORS[1:] else t for name, t in arguments().items()}
    problem["labels"] = torch.full((tokens,), -100)
    problem["hidden"] = problem["hidden"].clone().fill_(NAN)
    inputs = [problem[name].requires_grad_() for name in TENSORS]
    result = coordinate_cross_entropy(**problem, reduction=reduction, sample=torch.arange(tokens))
    assert torch.equal(result, torch.zeros(tokens if reduction == "none" else ()).double())
    for grad in torch.autograd.grad(result.sum(), inputs):
        assert not grad.any()
    if reduction == "mean":
        assert coordinate_cross_entropy(**problem, normalizer=torch.tensor(0)) == 0


def test_a_sample_without_active_tokens_counts_as_zero():
    losses = coordinate_cross_entropy(**arguments(), reduction="none")
    sample = torch.tensor([2, 4, 2, 2, 1, 4, 4])  # 0 and 3 have no tokens, that of 1 is ignored
    means = losses[[0, 2, 3]].mean() + losses[[1, 5, 6]].mean()
    for reduction, expected in (("per_sample_sum", means), ("per_sample_mean", means / 5)):
        actual = coordinate_cross_entropy(**arguments(), reduction=reduction, sample=sample.int())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalizer", [50, 12.5, torch.tensor(50), torch.tensor(12.5)])
def test_normalizer(normalizer):
    total = coordinate_cross_entropy(**arguments(), reduction="sum")
    mean = coordinate_cross_entropy(**arguments(), normalizer=normalizer)
    torch.testing.assert_close(mean, total / float(normalizer), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_the_softmax_is_in_float32_whatever_the_dtype(dtype):
    problem = arguments(dtype)
    inputs = [problem[name].requires_grad_() for name in TENSORS]
    wide = {name: t.detach().double().requires_grad_() if name in TENSORS else t for name, t in problem.items()}
    result = coordinate_cross_entropy(**problem)
    exact = coordinate_cross_entropy(**wide)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-6)
    grads = torch.autograd.grad(result, inputs)
    for grad, expected in zip(grads, torch.autograd.grad(exact, [wide[name] for name in TENSORS]), strict=True):
        assert grad.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6
        assert ((grad.double() - expected).abs() <= bound).all()
    mixed = {**problem, "weight": problem["weight"].double(), "height": problem["height"].float()}
    torch.testing.assert_close(coordinate_cross_entropy(**mixed), result, rtol=0, atol=0)


def test_gradcheck():
    problem = arguments()
    inputs = [problem[name].requires_grad_() for name in TENSORS]
    for options in ({}, {"reduction": "none"}, {"reduction": "per_sample_mean", "sample": torch.arange(7) // 3}):

        def loss(*tensors, options=options):
            return coordinate_cross_entropy(**{**problem, **dict(zip(TENSORS, tensors, strict=True))}, **options)

        assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, inputs)


SAMPLE = {"reduction": "per_sample_sum"}
BAD = [
    (changed("labels", 5, 21), r"labels\[5\] must be -100 or in \[0, 21\), got 21"),
    (changed("labels", 0, -1), r"labels\[0\] must be -100 or in \[0, 21\), got -1"),
    ({"ignore_index": 3}, r"labels\[4\] must be 3 or in \[0, 21\), got -100"),
    (changed("axis", 3, 3), r"axis\[3\] must be -1, 0, 1 or 2, got 3"),
    (changed("axis", 3, -2), r"axis\[3\] must be -1, 0, 1 or 2, got -2"),
    (changed("positions", 1, NAN), r"positions\[1\] must be a number where axis names a table, got nan"),
    ({"hidden": torch.zeros(1, 7, 6)}, r"hidden must have shape \[N, C\], got \[1, 7, 6\]"),
    ({"hidden": torch.zeros(7, 6).int()}, "hidden must be float16 .* got torch.int32"),
    ({"weight": torch.zeros(9, 5)}, r"weight must have shape \[V, 6\], got \[9, 5\]"),
    ({"temporal": torch.zeros(4, 5)}, r"temporal must have shape \[n, 6\], got \[4, 5\]"),
    ({"width": torch.zeros(0, 6)}, r"width must have at least one row, got \[0, 6\]"),
    ({"labels": torch.zeros(6).long()}, r"labels must have shape \[7\], got \[6\]"),
    ({"labels": torch.zeros(7)}, "labels must be int32 or int64, got torch.float32"),
    ({"axis": torch.zeros(6).char()}, r"axis must have shape \[7\], got \[6\]"),
    ({"axis": torch.zeros(7).long()}, "axis must be int8, got torch.int64"),
    ({"positions": torch.zeros(6).double()}, r"positions must have shape \[7\], got \[6\]"),
    ({"positions": torch.zeros(7)}, "positions must be float64, got torch.float32"),
    ({"reduction": "batchmean"}, f"reduction must be one of {', '.join(REDUCTIONS)}, got 'batchmean'"),
    *[
        ({"reduction": reduction, "normalizer": 3}, f'normalizer goes with reduction "mean" only, got "{reduction}"')
        for reduction in REDUCTIONS
        if reduction != "mean"
    ],
    ({"normalizer": 0}, "normalizer must be a positive number, got 0.0"),
    ({"normalizer": torch.tensor(-2)}, "normalizer must be a positive number, got -2.0"),
    ({"normalizer": torch.inf}, "normalizer must be a positive number, got inf"),
    ({"normalizer": NAN}, "normalizer must be a positive number, got nan"),
    ({"normalizer": torch.ones(1)}, r"normalizer must be a number or a 0-dim tensor, got shape \[1\]"),
    (SAMPLE, 'reduction "per_sample_sum" needs sample'),
    ({"reduction": "per_sample_mean"}, 'reduction "per_sample_mean" needs sample'),
    ({**SAMPLE, "sample": torch.zeros(6).long()}, r"sample must have shape \[7\], got \[6\]"),
    ({**SAMPLE, "sample": torch.zeros(7)}, "sample must be int32 or int64, got torch.float32"),
    ({**SAMPLE, "sample": torch.tensor([0, 0, 0, 0, -1, 0, 0])}, r"sample\[4\] must not be negative, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"^coordinate_cross_entropy: {message}$"):
        coordinate_cross_entropy(**arguments(**changes))
