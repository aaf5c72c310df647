"""The input embeddings of a language model: against the published vectors, and against loops that share no code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_st_ops.reference import (
    interpolate_rows,
    lape_scatter,
    neighboring_token_propagation,
)
from tests.reference.lape_cases import (
    AXES,
    LOW_PRECISION,
    NAN,
    coordinates,
    load_golden,
    random_table,
)


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("name", ["splice_video", "splice_image"])
def test_golden_splice(name, compat):
    tensors, config = load_golden(name)
    ids = tensors["input_ids"][0]
    # What the released code leaves as it is: here a matter of what is passed.
    released = compat == "released"
    axis, positions = coordinates(ids, config, skip=("width_input",) if released else ())
    visual_index = torch.full_like(ids, -1)
    if name == "splice_video":
        visual = torch.cat([tensors["fast"].flatten(0, 1), tensors["slow"].flatten(0, 1)])
        fast, slow = config["fast_block_start"], config["slow_block_start"]
        visual_index[slow : slow + 1620] = 900 + torch.arange(1620)
        if not released:
            visual_index[fast : fast + 900] = torch.arange(900)
    else:
        visual = tensors["image_features"].flatten(0, 1)
        visual_index[config["image_block_start"] :][:729] = torch.arange(729)
    tables = [neighboring_token_propagation(tensors[f"{axis}_input"], compat=compat) for axis in AXES]
    output = lape_scatter(tensors["embed_tokens"], *tables, ids, axis, positions, visual_index, visual)
    expected = tensors[f"inputs_embeds_{compat}"][0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    copied = (visual_index >= 0) | ((axis < 0) & (ids < config["vocab_rows"]))
    assert copied.sum() + (axis >= 0).sum() + ((ids >= 74) & (visual_index < 0)).sum() == len(ids)
    assert torch.equal(output[copied], expected[copied])


@st.composite
def scatter_problem(draw):
    """Arguments of lape_scatter, in float64: each token is a word, an anchor, a coordinate, or visual."""
    words, n, m, k, visuals = (draw(st.integers(1, 5)) for _ in range(5))
    tokens, channels = draw(st.integers(0, 12)), draw(st.integers(0, 3))
    many = {"min_size": tokens, "max_size": tokens}
    ids = draw(st.lists(st.integers(0, words + n + m + k - 1), **many))
    axis = draw(st.lists(st.integers(-1, 2), **many))
    places = draw(st.lists(st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.5, 1.0]), **many))
    visual = draw(st.lists(st.sampled_from([-1, -1, *range(visuals)]), **many))
    tables = [random_table(rows, channels, i) for i, rows in enumerate((words, n, m, k))]
    position = torch.tensor(places, dtype=torch.float64).masked_fill(torch.tensor(axis).reshape(-1) < 0, NAN)
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    return {
        **dict(zip(("embed", *AXES), tables, strict=True)),
        "input_ids": torch.tensor(ids, dtype=index),
        "axis": torch.tensor(axis, dtype=torch.int8),
        "positions": position,
        "visual_index": torch.tensor(visual, dtype=index),
        "visual": random_table(visuals, channels, 9),
    }


def loop_sources(problem):
    """For each token the rows it is made of: (name of the tensor, row, weight)."""
    parts = []
    columns = (problem[key].tolist() for key in ("input_ids", "axis", "positions", "visual_index"))
    for token, axis, position, visual in zip(*columns, strict=True):
        if visual >= 0:
            parts.append([("visual", visual, 1.0)])
        elif axis >= 0:
            anchor = min(max(position, 0.0), 1.0) * (len(problem[AXES[axis]]) - 1)
            low = int(anchor)
            parts.append([(AXES[axis], low, 1 - (anchor - low))])
            if anchor > low:
                parts[-1].append((AXES[axis], low + 1, anchor - low))
        else:
            for name in ("embed", *AXES):
                if token < len(problem[name]):
                    parts.append([(name, token, 1.0)])
                    break
                token -= len(problem[name])
    return parts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scatter_problem())
def test_scatter_and_its_gradients_against_loops(problem):
    names = ("embed", *AXES, "visual")
    inputs = [problem[name].requires_grad_() for name in names]
    output = lape_scatter(**problem)
    grad = random_table(*output.shape, 3)
    found = dict(zip(names, torch.autograd.grad(output, inputs, grad), strict=True))
    expected, grads = torch.zeros_like(output), {name: torch.zeros_like(problem[name]) for name in names}
    for token, parts in enumerate(loop_sources(problem)):
        for name, row, weight in parts:
            expected[token] += weight * problem[name][row].detach()
            grads[name][row] += weight * grad[token]
    torch.testing.assert_close(output.detach(), expected.detach(), rtol=0, atol=1e-13)
    for name in names:
        torch.testing.assert_close(found[name], grads[name], rtol=0, atol=1e-13)


def scatter_arguments(**changes):
    """Four words and three tables of 3; a word, three coordinates, an anchor, a visual token and a word."""
    problem = {
        **dict(zip(("embed", *AXES), (random_table(rows, 2, rows) for rows in (4, 3, 3, 3)), strict=True)),
        "input_ids": torch.tensor([3, 0, 0, 0, 12, 1, 2]),
        "axis": torch.tensor([-1, 0, 1, 2, -1, -1, -1], dtype=torch.int8),
        "positions": torch.tensor([NAN, 0.1, 0.5, 0.8, NAN, NAN, NAN], dtype=torch.float64),
        "visual_index": torch.tensor([-1, -1, -1, -1, -1, 1, -1]),
        "visual": random_table(2, 2, 5),
    }
    return {**problem, **changes}


def changed(name, at, value):
    tensor = scatter_arguments()[name].clone()
    tensor[at] = value
    return {name: tensor}


def test_what_does_not_count_is_not_read():
    expected = lape_scatter(**scatter_arguments())
    for changes in (
        changed("input_ids", 5, -200),  # the placeholder of a visual token
        changed("input_ids", 2, 99),  # that of a coordinate
        changed("positions", 6, 0.3),  # of a token that takes the row of its id
        changed("axis", 5, 1),  # a coordinate without a position, but a visual token lies over it
        changed("axis", 5, 7),
        {"visual": torch.cat([scatter_arguments()["visual"], torch.zeros(3, 2)]).double()},
    ):
        assert torch.equal(lape_scatter(**scatter_arguments(**changes)), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_tables_of_another_dtype_are_rounded_to_that_of_embed_once(dtype):
    exact = lape_scatter(**scatter_arguments())
    problem = {name: t.to(dtype) if name in ("embed", "visual") else t for name, t in scatter_arguments().items()}
    output = lape_scatter(**problem)
    assert output.dtype == dtype
    assert torch.equal(output, exact.float().to(dtype))
    for name in AXES:
        problem[name] = problem[name].to(dtype)
    rows = interpolate_rows(problem["height"], torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(lape_scatter(**problem)[2:3], rows)


BAD_SCATTER = [
    (changed("input_ids", [4, 6], 13), r"input_ids\[4\] must be in \[0, 13\), got 13"),
    (changed("input_ids", 6, -1), r"input_ids\[6\] must be in \[0, 13\), got -1"),
    (changed("positions", 3, NAN), r"positions\[3\] must be a number where axis names a table, got nan"),
    (changed("axis", 2, 3), r"axis\[2\] must be -1, 0, 1 or 2, got 3"),
    (changed("axis", 2, -2), r"axis\[2\] must be -1, 0, 1 or 2, got -2"),
    (changed("visual_index", 0, 2), r"visual_index\[0\] must be -1 or in \[0, 2\), got 2"),
    (changed("visual_index", 0, -2), r"visual_index\[0\] must be -1 or in \[0, 2\), got -2"),
    ({"embed": torch.zeros(4)}, r"embed must have shape \[V, C\], got \[4\]"),
    ({"embed": torch.zeros(4, 2).long()}, "embed must be float16 or bfloat16 or float32 or float64, got torch.int64"),
    ({"height": torch.zeros(3, 5)}, r"height must have shape \[n, 2\], got \[3, 5\]"),
    ({"width": torch.zeros(0, 2)}, r"width must have at least one row, got \[0, 2\]"),
    ({"temporal": torch.zeros(3, 2).int()}, "temporal must be float16 .* got torch.int32"),
    ({"input_ids": torch.zeros(1, 7).long()}, r"input_ids must have shape \[N\], got \[1, 7\]"),
    ({"input_ids": torch.zeros(7)}, "input_ids must be int32 or int64, got torch.float32"),
    ({"axis": torch.zeros(6).char()}, r"axis must have shape \[7\], got \[6\]"),
    ({"axis": torch.zeros(7).long()}, "axis must be int8, got torch.int64"),
    ({"positions": torch.zeros(8).double()}, r"positions must have shape \[7\], got \[8\]"),
    ({"positions": torch.zeros(7)}, "positions must be float64, got torch.float32"),
    ({"visual_index": torch.zeros(2).long()}, r"visual_index must have shape \[7\], got \[2\]"),
    ({"visual_index": torch.zeros(7)}, "visual_index must be int32 or int64, got torch.float32"),
    ({"visual": torch.zeros(2, 3).double()}, r"visual must have shape \[M, 2\], got \[2, 3\]"),
    ({"visual": torch.zeros(2, 2)}, "visual must be float64, got torch.float32"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SCATTER)
def test_bad_scatter(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"^lape_scatter: {message}$"):
        lape_scatter(**scatter_arguments(**changes))


def test_gradcheck():
    problem = scatter_arguments()
    names = ("embed", *AXES, "visual")
    inputs = [problem[name].requires_grad_() for name in names]
    run = lambda *x: lape_scatter(**{**problem, **dict(zip(names, x, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
