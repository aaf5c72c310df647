"""Calls of every public op: arguments of any shape, dtype and layout, and the reference of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from torch import Tensor

import llava_st_ops
from llava_st_ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "offset", "strided", "expanded", "reversed order")
NAN = float("nan")


@dataclass
class Call:
    """A call of an op: `run(*sources)` and `plain(*sources)`, its reference. `sources` have gradients.

    Attributes:
        name: of the op.
        sources: the tensors that can be differentiated.
        run: the op.
        plain: its reference.
        others: what `run` and `plain` take besides, by name.
    """

    name: str
    sources: dict[str, Tensor]
    run: Callable[..., Any]
    plain: Callable[..., Any]
    others: dict[str, Any] = field(default_factory=dict)

    def of(self, function: Callable[..., Any], sources: Sequence[Tensor]) -> Tensor:
        """What `function` gives for these sources; several outputs in one row."""
        result = function(**dict(zip(self.sources, sources, strict=True)), **self.others)
        return torch.cat([part.flatten() for part in result]) if isinstance(result, tuple) else result


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values at other places in memory; "expanded" repeats the first entry along the first dimension."""
    if not values.dim() or not values.numel() or layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":  # misaligned by one element
        memory = values.new_full((values.numel() + 1,), NAN)
        memory[1:] = values.flatten()
        return memory[1:].view(values.shape)
    if layout == "strided":
        memory = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), NAN)
        memory[..., 1::2] = values
        return memory[..., 1::2]
    if layout == "expanded":
        return values[:1].expand(values.shape)
    order = list(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, layouts: Sequence[str] = LAYOUTS) -> Tensor:
    """Random values, now and then huge, tiny or all the same."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return laid_out(
        values.to(dtype) * draw(st.sampled_from((1.0, 1.0, 1.0, 30.0, 1e-3, 0.0))), draw(st.sampled_from(layouts))
    )


sizes = st.sampled_from((1, 1, 2, 3, 3, 4, 5, 7, 0))
channels = st.sampled_from((1, 2, 3, 7, 8, 9, 16, 24, 33, 64, 0))
regions = st.tuples(*[st.sampled_from((1, 2, 3, 5))] * 3)


def _regions_of(grid: Sequence[int], region: Sequence[int]) -> list[int]:
    return [-(-size // step) for size, step in zip(grid, region, strict=True)]


@st.composite
def _attention(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    batch, grid, region = draw(sizes), draw(st.tuples(sizes, sizes, sizes)), draw(regions)
    heads, dim = draw(sizes), draw(channels)
    key = (batch, *grid, heads, dim)
    query = (batch, *_regions_of(grid, region), heads, dim)
    shapes = {"query": query, "key": key, "value": key}
    sources = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    others = {"region": region, "scale": draw(st.sampled_from((None, 0.5, -1.0, 0.0)))}
    return Call(
        "attention", sources, llava_st_ops.point_to_region_attention, reference.point_to_region_attention, others
    )


def _grids(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    return draw(st.lists(st.tuples(sizes, sizes, sizes), max_size=3))


@st.composite
def _packed_attention(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    grids, region, heads, dim = _grids(draw), draw(regions), draw(sizes), draw(channels)
    tokens = sum(t * h * w for t, h, w in grids)
    queries = sum(torch.Size(_regions_of(grid, region)).numel() for grid in grids)
    rows = {"query": queries, "key": tokens, "value": tokens}
    sources = {name: draw(tensors((count, heads, dim), dtype)) for name, count in rows.items()}
    others = {"grid_thw": _grid_tensor(draw, grids), "region": region}
    run, plain = llava_st_ops.point_to_region_attention_packed, reference.point_to_region_attention_packed
    return Call("packed attention", sources, run, plain, others)


def _understanding_masks(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A reference, which knows additive biases of every head, for all that the op takes."""

    def call(*, key: Tensor, bias: Tensor | None, **others: Any) -> Any:
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros(bias.shape, dtype=key.dtype).masked_fill(~bias, -torch.inf)
            bias = bias.expand(key.shape[:-1])
        return plain(key=key, bias=bias, **others)

    return call


@st.composite
def _biased(draw: st.DrawFn, dtype: torch.dtype, packed: bool) -> Call:
    """Attention with a bias or a mask, and values of any width."""
    call = draw((_packed_attention if packed else _attention)(dtype))
    key, value = call.sources["key"], call.sources["value"]
    call.sources["value"] = draw(tensors((*value.shape[:-1], draw(channels)), dtype))
    shape = (*key.shape[:-2], draw(st.sampled_from((1, key.shape[-2]))))
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.3
    if draw(st.booleans()):
        call.others["bias"] = laid_out(~hidden, draw(st.sampled_from(LAYOUTS)))
    else:
        call.sources["bias"] = draw(tensors(shape, dtype)).masked_fill(hidden, -torch.inf)
    call.name, call.plain = f"{call.name} with a bias", _understanding_masks(call.plain)
    return call


def _grid_tensor(draw: st.DrawFn, grids: Sequence[Sequence[int]]) -> Tensor:
    grid_thw = torch.tensor(grids, dtype=draw(st.sampled_from((torch.int32, torch.int64)))).view(-1, 3)
    return grid_thw.t().contiguous().t() if draw(st.booleans()) else grid_thw


@st.composite
def _normalized(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    batch, grid, region = draw(sizes), draw(st.tuples(sizes, sizes, sizes)), draw(regions)
    heads, width = draw(sizes), draw(channels.filter(bool))
    key = (batch, *grid, width)
    shapes = {"query": (batch, *_regions_of(grid, region), heads, width), "key": key, "value": key}
    sources = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    run, plain = llava_st_ops.normalized_region_attention, reference.normalized_region_attention
    return Call(
        "normalized attention", sources, run, plain, {"region": region, "eps": draw(st.sampled_from((1e-5, 1e-2)))}
    )


def _tables(draw: st.DrawFn, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows = st.sampled_from((1, 2, 3, 5, 10))
    return {name: draw(tensors((draw(rows), width), dtype)) for name in ("temporal", "height", "width")}


@st.composite
def _lape_add(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    grid, width = draw(st.tuples(*[sizes] * 4)), draw(channels)
    sources = {"features": draw(tensors((*grid, width), dtype)), **_tables(draw, width, dtype)}
    flags = {name: draw(st.booleans()) for name in ("text_aligned", "round_every_addition")}
    return Call("lape_add", sources, llava_st_ops.lape_add, reference.lape_add, flags)


@st.composite
def _lape_add_packed(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    grids, width = _grids(draw), draw(channels)
    tokens = sum(t * h * w for t, h, w in grids)
    sources = {"features": draw(tensors((tokens, width), dtype)), **_tables(draw, width, dtype)}
    others = {"grid_thw": _grid_tensor(draw, grids), "text_aligned": draw(st.booleans())}
    return Call("lape_add_packed", sources, llava_st_ops.lape_add_packed, reference.lape_add_packed, others)


def _tokens(draw: st.DrawFn, count: int, ids: int) -> dict[str, Tensor]:
    """Ids, axes and positions of tokens: words, anchors and coordinates."""
    axis = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    fractions = st.sampled_from((0.0, 1.0, 0.5, 1 / 3, 0.999999, -0.5, 2.0, float("inf")))
    return {
        "ids": torch.tensor(draw(st.lists(st.integers(0, ids - 1), min_size=count, max_size=count)), dtype=torch.int64),
        "axis": torch.tensor(axis, dtype=torch.int8),
        "positions": torch.tensor([draw(fractions) if a >= 0 else NAN for a in axis], dtype=torch.float64),
    }


@st.composite
def _scatter(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    count, width, words, visuals = draw(sizes), draw(channels), draw(st.integers(1, 9)), draw(sizes)
    tables = _tables(draw, width, dtype)
    sources = {
        "embed": draw(tensors((words, width), dtype)),
        **tables,
        "visual": draw(tensors((visuals, width), dtype)),
    }
    tokens = _tokens(draw, count, words + sum(map(len, tables.values())))
    index = draw(st.lists(st.integers(-1, visuals - 1), min_size=count, max_size=count))
    others = {"input_ids": tokens["ids"], "axis": tokens["axis"], "positions": tokens["positions"]}
    others["visual_index"] = torch.tensor(index, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    return Call("lape_scatter", sources, llava_st_ops.lape_scatter, reference.lape_scatter, others)


@st.composite
def _loss(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    count, width, words = draw(sizes), draw(channels), draw(st.integers(1, 40))
    tables = _tables(draw, width, dtype)
    sources = {"hidden": draw(tensors((count, width), dtype)), "weight": draw(tensors((words, width), dtype)), **tables}
    tokens = _tokens(draw, count, words + sum(map(len, tables.values())))
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    others = {
        "labels": tokens["ids"].masked_fill(ignored, -100),
        "axis": tokens["axis"],
        "positions": tokens["positions"],
    }
    others["reduction"] = draw(st.sampled_from(("none", "mean", "sum", "per_sample_sum", "per_sample_mean")))
    if others["reduction"].startswith("per_sample"):
        others["sample"] = torch.arange(count) // 2
    run, plain = llava_st_ops.coordinate_cross_entropy, reference.coordinate_cross_entropy
    return Call("coordinate_cross_entropy", sources, run, plain, others)


@st.composite
def _mlp(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    grid, wide, out = draw(st.tuples(*[sizes] * 4)), draw(channels.filter(bool)), draw(channels.filter(bool))
    hidden, count = draw(channels.filter(bool)), draw(st.sampled_from((1, 2)))
    shapes = {"features": (*grid, wide), "weight": (count * hidden, wide), "bias": (count * hidden,)}
    shapes |= {f"position{i}": (size, count * hidden) for i, size in enumerate(grid[1:])}
    shapes |= {f"second_weight{i}": (out, hidden) for i in range(count)}
    shapes |= {f"second_bias{i}": (out,) for i in range(count)}
    if 0 in grid[1:]:  # tables have a row at least
        return draw(_mlp(dtype))

    def with_lists(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(features: Tensor, weight: Tensor, bias: Tensor, **rest: Tensor) -> Any:
            lists = [
                [x for name, x in rest.items() if name.startswith(kind)]
                for kind in ("position", "second_weight", "second_bias")
            ]
            return function(features, weight, bias, *lists)

        return call

    def plain(features: Tensor, weight: Tensor, bias: Tensor, positions: Any, weights: Any, biases: Any) -> Any:
        parts = reference.linear_lape_gelu(features, weight, bias, *positions)[0].chunk(len(weights), -1)
        return tuple(torch.nn.functional.linear(x, w, b) for x, w, b in zip(parts, weights, biases, strict=True))

    sources = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    return Call("lape_mlp", sources, with_lists(llava_st_ops.lape_mlp), with_lists(plain))


@st.composite
def _propagation(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    table = draw(tensors((draw(sizes), draw(channels)), dtype))
    run, plain = llava_st_ops.neighboring_token_propagation, reference.neighboring_token_propagation
    return Call("propagation", {"table": table}, run, plain, {"compat": draw(st.sampled_from(("paper", "released")))})


@st.composite
def _centers(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    x = draw(tensors((*draw(st.tuples(*[sizes] * 4)), draw(channels)), dtype))
    return Call("centers", {"x": x}, llava_st_ops.region_centers, reference.region_centers, {"region": draw(regions)})


OPS = {
    "attention": _attention,
    "packed attention": _packed_attention,
    "attention with a bias": functools.partial(_biased, packed=False),
    "packed attention with a bias": functools.partial(_biased, packed=True),
    "normalized attention": _normalized,
    "lape_add": _lape_add,
    "lape_add_packed": _lape_add_packed,
    "lape_scatter": _scatter,
    "coordinate_cross_entropy": _loss,
    "lape_mlp": _mlp,
    "propagation": _propagation,
    "centers": _centers,
}


def calls(name: str, dtype: torch.dtype | None = None) -> st.SearchStrategy[Call]:
    """Calls of an op, in one dtype or any."""
    dtypes = st.sampled_from(DTYPES) if dtype is None else st.just(dtype)
    return dtypes.flatmap(OPS[name])


@functools.cache
def example(name: str, dtype: torch.dtype = torch.float32) -> Call:
    """A call that is always the same, without empty tensors."""
    quiet = settings(
        max_examples=2000, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return find(calls(name, dtype), lambda call: all(x.numel() > 8 for x in call.sources.values()), settings=quiet)
