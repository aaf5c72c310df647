"""Language-Aligned Positional Embedding in plain PyTorch: the same tables of anchors for patches and for coordinates.

Coordinates come as a pair of dense tensors, one entry per token: `axis [N]` int8 names the table (-1 none, 0 temporal,
1 height, 2 width), `positions [N]` float64 holds the fraction of that axis, NaN where there is none. An index tensor
into a list of positions would have to be built with a host synchronisation, range-checked, and rebuilt when labels are
shifted; the pair is shifted by slicing, is what `coordinate_cross_entropy` takes, and costs 9 bytes per token. `axis`
cannot be derived from the ids without six more arguments, and it lets the caller leave a template token as it is (the
released model does so with `<WIDTH-INPUT>`): pass -1. Positions are data: no gradient flows into them.

A result is computed in float32 (float64 where the result is float64) and rounded to its dtype once. Errors are
ValueErrors, and TypeErrors where a dtype is wrong. Source: ../shared/SPEC.md, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
AXES = ("temporal", "height", "width")
NO_AXIS = -1
ALIGNMENTS = ("ends", "centers", "text")


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype] = FLOATS
) -> None:
    """`shape` holds the sizes wanted, or a name where any size will do."""
    fits = len(shape) == tensor.dim() and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {tensor.dtype}")


def check_table(op: str, name: str, table: Tensor, channels: int | str = "C") -> None:
    check_tensor(op, name, table, ("n", channels))
    if not len(table):
        raise ValueError(f"{op}: {name} must have at least one row, got {list(table.shape)}")


def reject(op: str, name: str, values: Tensor, wrong: Tensor, rule: str) -> None:
    """Names the first entry of `values` that is wrong."""
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name}[{', '.join(map(str, at))}] must {rule}, got {values[at].item()}")


def check_coordinates(op: str, axis: Tensor, positions: Tensor, read: Tensor) -> None:
    """That axes exist, and have a position, at the tokens where `read` is true."""
    reject(op, "axis", axis, read & ((axis < NO_AXIS) | (axis >= len(AXES))), "be -1, 0, 1 or 2")
    reject(op, "positions", positions, read & (axis >= 0) & positions.isnan(), "be a number where axis names a table")


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def blend(low: Tensor, high: Tensor, ratio: Tensor) -> Tensor:
    """`(1 - ratio) low + ratio high`, weights rounded from float64; at ratio 0 `low` to the bit, even if infinite."""
    return torch.where(ratio == 0, low, (1 - ratio).to(low.dtype) * low + ratio.to(low.dtype) * high)


def anchors_around(positions: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of positions, float64: the anchors below and above, int64, and how far between them, in [0, 1), float64."""
    return _around(positions.detach().clamp(0, 1) * (count - 1))


def _around(anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = anchor.floor()
    return low.long(), anchor.ceil().long(), anchor - low


def _rows(table: Tensor, around: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    low, high, ratio = around
    table_wide = table.to(computing_dtype(table.dtype))
    return blend(table_wide[low], table_wide[high], ratio.unsqueeze(-1)).to(table.dtype)


def interpolate_rows(table: Tensor, positions: Tensor) -> Tensor:
    """table `[n, C]`, positions `[P]` float64 in fractions of the axis -> `[P, C]`: `(1 - r) row f + r row g`, where
    `e = (n - 1) p` with p clipped to [0, 1], `f = floor(e)`, `g = ceil(e)`, `r = e - f`. NaN is an error."""
    check_table("interpolate_rows", "table", table)
    check_tensor("interpolate_rows", "positions", positions, ("P",), (torch.float64,))
    reject("interpolate_rows", "positions", positions, positions.isnan(), "be a number")
    return _rows(table, anchors_around(positions, len(table)))


def resize_table(table: Tensor, size: int, alignment: str) -> Tensor:
    """`[n, C]` -> `[size, C]`, linearly along the anchors. With "ends" and "centers", size = n is the identity, to the
    bit.

    `alignment` says where row i sits:
    - "ends": at anchor `(n - 1) i / (size - 1)`, as a text coordinate `i / (size - 1)` does; size 1 takes row 0.
    - "centers": at `(i + 1/2) n / size - 1/2`, clamped to [0, n - 1]: half-pixel centres, as
      `F.interpolate(align_corners=False)` has them.
    - "text": at `(n - 1) (i + 1/2) / size`, where a text coordinate puts the centre of cell i.
    These source positions, and the weights, are computed in float64 whatever the dtype of the table (torch takes
    float32 for float32: off by 1e-5 for 100 anchors).
    """
    check_table("resize_table", "table", table)
    if size < 0:
        raise ValueError(f"resize_table: size must not be negative, got {size}")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"resize_table: alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    count = len(table)
    row = torch.arange(size, dtype=torch.float64, device=table.device)
    if alignment == "ends":
        anchor = row * (count - 1) / max(size - 1, 1)
    elif alignment == "text":
        anchor = (2 * row + 1) * (count - 1) / (2 * size)
    else:
        anchor = (((2 * row + 1) * count - size) / (2 * size)).clamp(0, count - 1)  # rounded once: exact at anchors
    return _rows(table, _around(anchor))


def lape_add(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """features `[B, T, H, W, C]`, tables `[n, C]`, `[m, C]`, `[m', C]` -> like features: `((x + h) + w) + t`.

    The tables are resized (see `resize_table`) to T with aligned ends, so that a single frame, or an image, takes
    temporal row 0, and to H and W by half-pixel centres or, `text_aligned`, as text coordinates lie. Everything is
    computed in float32 (float64 for float64 features), to which tables of other float dtypes are converted, and rounded
    once. `round_every_addition` rounds the tables after resizing, and the sum after every addition, to the dtype of
    features, as published.
    """
    check_tensor("lape_add", "features", features, ("B", "T", "H", "W", "C"))
    for name, table in zip(AXES, (temporal, height, width), strict=True):
        check_table("lape_add", name, table, features.shape[-1])
    _, frames, rows, columns, _ = features.shape
    wide = computing_dtype(features.dtype)
    adding = features.dtype if round_every_addition else wide
    spatial = "text" if text_aligned else "centers"
    t = resize_table(temporal.to(wide), frames, "ends").to(adding)[:, None, None]
    h = resize_table(height.to(wide), rows, spatial).to(adding)[:, None]
    w = resize_table(width.to(wide), columns, spatial).to(adding)
    return (((features.to(adding) + h) + w) + t).to(features.dtype)


def _table_gradients(
    add: Callable[..., Tensor], grad_output: Tensor, tables: Sequence[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [table.detach().requires_grad_() for table in tables]
        output = add(torch.zeros_like(grad_output), *leaves, *others)
        temporal, height, width = torch.autograd.grad(output, leaves, grad_output)
    return temporal, height, width


def lape_add_backward(
    grad_output: Tensor, temporal: Tensor, height: Tensor, width: Tensor, text_aligned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three tables; that of features is grad_output."""
    return _table_gradients(lape_add, grad_output, (temporal, height, width), text_aligned)


def lape_add_packed(
    features: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    grid_thw: Tensor,
    text_aligned: bool = False,
    round_every_addition: bool = False,
) -> Tensor:
    """`lape_add` of videos that follow each other: features `[tokens, C]`, grid_thw int `[videos, 3]` -> like features.

    The tables are resized to each video's own time, height and width. Reads `grid_thw` back to the host.
    """
    op = "lape_add_packed"
    check_tensor(op, "features", features, ("tokens", "C"))
    for name, table in zip(AXES, (temporal, height, width), strict=True):
        check_table(op, name, table, features.shape[-1])
    check_tensor(op, "grid_thw", grid_thw, ("videos", 3), INTEGERS)
    grids = grid_thw.tolist()
    for video, grid in enumerate(grids):
        if min(grid) < 0:
            raise ValueError(f"{op}: grid_thw must not be negative, got {grid} for video {video}")
    sizes = [math.prod(grid) for grid in grids]
    if sum(sizes) != len(features):
        raise ValueError(f"{op}: grid_thw must add up to the {len(features)} tokens of features, got {sum(sizes)}")
    outputs = []
    # With an empty video in any case: without one there would be nothing to concatenate, and no gradient of the tables.
    for grid, video in zip([[0, 1, 1], *grids], features.split([0, *sizes]), strict=True):
        video = video.unflatten(0, (1, *grid))
        video = lape_add(video, temporal, height, width, text_aligned, round_every_addition)
        outputs.append(video.flatten(0, 3))
    return torch.cat(outputs)


def lape_add_packed_backward(
    grad_output: Tensor, temporal: Tensor, height: Tensor, width: Tensor, grid_thw: Tensor, text_aligned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three tables; that of features is grad_output."""
    return _table_gradients(lape_add_packed, grad_output, (temporal, height, width), grid_thw, text_aligned)


def check_scatter(
    op: str,
    embed: Tensor,
    tables: Sequence[Tensor],
    input_ids: Tensor,
    axis: Tensor,
    positions: Tensor,
    visual_index: Tensor,
    visual: Tensor,
) -> None:
    """Shapes and dtypes; token tensors may have any shape, the same for all."""
    check_tensor(op, "embed", embed, ("V", "C"))
    channels = embed.shape[1]
    for name, table in zip(AXES, tables, strict=True):
        check_table(op, name, table, channels)
    check_tensor(op, "input_ids", input_ids, input_ids.shape, INTEGERS)
    check_tensor(op, "axis", axis, input_ids.shape, (torch.int8,))
    check_tensor(op, "positions", positions, input_ids.shape, (torch.float64,))
    check_tensor(op, "visual_index", visual_index, input_ids.shape, INTEGERS)
    check_tensor(op, "visual", visual, ("M", channels), (embed.dtype,))


def check_scattered_tokens(
    op: str, ids: int, visuals: int, input_ids: Tensor, axis: Tensor, positions: Tensor, visual_index: Tensor
) -> None:
    """That what counts of each token exists, of `ids` ids and `visuals` visual tokens."""
    is_visual = visual_index != -1
    missing = is_visual & ((visual_index < 0) | (visual_index >= visuals))
    reject(op, "visual_index", visual_index, missing, f"be -1 or in [0, {visuals})")
    check_coordinates(op, axis, positions, read=~is_visual)
    is_text = ~is_visual & (axis == NO_AXIS)
    reject(op, "input_ids", input_ids, is_text & ((input_ids < 0) | (input_ids >= ids)), f"be in [0, {ids})")


def lape_scatter(
    embed: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    input_ids: Tensor,
    axis: Tensor,
    positions: Tensor,
    visual_index: Tensor,
    visual: Tensor,
) -> Tensor:
    """The input embeddings of a language model, for a batch of samples flattened to N tokens.

    embed `[V, C]`, tables `[n, C]`, `[m, C]`, `[m', C]`, input_ids `[N]` int, axis `[N]` int8 and positions `[N]`
    float64 (see the top of this file), visual_index `[N]` int (-1: none) into visual `[M, C]` -> `[N, C]` in the dtype
    of embed, which is also that of visual; the tables may have another. Of each token the first that applies counts:
    1. visual_index >= 0: that visual token. Not all need be used, and one may be used twice.
    2. axis >= 0: the row of that table interpolated at the position, see `interpolate_rows`.
    3. The row of its id: V ids of embed, then n of temporal, m of height and m' of width.
    What does not count is not read: the id of a placeholder may be anything, and so may the position of a token
    without an axis. What counts must exist: an index, an axis, an id out of range or a NaN position is an error that
    names the token, by its number in the flattened batch.
    """
    op = "lape_scatter"
    tables = (temporal, height, width)
    check_tensor(op, "input_ids", input_ids, ("N",), INTEGERS)
    check_scatter(op, embed, tables, input_ids, axis, positions, visual_index, visual)
    ids = len(embed) + sum(map(len, tables))
    check_scattered_tokens(op, ids, len(visual), input_ids, axis, positions, visual_index)
    is_visual = visual_index >= 0
    is_text = ~is_visual & (axis == NO_AXIS)

    output = embed.new_zeros(len(input_ids), embed.shape[1])
    first = 0
    for source in (embed, *tables):
        here = is_text & (first <= input_ids) & (input_ids < first + len(source))
        output = output.index_put((here,), source[input_ids[here] - first].to(embed.dtype))
        first += len(source)
    for number, table in enumerate(tables):
        here = ~is_visual & (axis == number)
        rows = interpolate_rows(table.to(computing_dtype(embed.dtype)), positions[here])
        output = output.index_put((here,), rows.to(embed.dtype))
    return output.index_put((is_visual,), visual[visual_index[is_visual]])


def lape_scatter_backward(
    grad_output: Tensor,
    destination: Tensor,
    token: Tensor,
    share: Tensor,
    embed: Tensor,
    temporal: Tensor,
    height: Tensor,
    width: Tensor,
    visual: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of embed, the tables and visual, whose rows are numbered through in this order: entry e adds
    `share[e] * grad_output[token[e]]` to row `destination[e]`, if there is one. See `ops.lape_scatter`."""
    sources = (embed, temporal, height, width, visual)
    wide = computing_dtype(grad_output.dtype)
    rows = sum(map(len, sources))
    kept = destination < rows
    shares = share[kept].to(wide).unsqueeze(1) * grad_output[token[kept]].to(wide)
    sums = shares.new_zeros(rows, embed.shape[1]).index_add(0, destination[kept], shares)
    parts = sums.split([len(source) for source in sources])
    return tuple(part.to(source.dtype) for part, source in zip(parts, sources, strict=True))


def _sweeps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum of `2^-|i-j| row_j` over the rows j up to it, and over those from it on: in linear time."""
    if not len(rows):
        return rows, rows
    forwards, backwards = (
        list(accumulate(sequence, lambda total, row: row + total / 2))
        for sequence in (rows.unbind(), rows.unbind()[::-1])
    )
    return torch.stack(forwards), torch.stack(backwards[::-1])


def propagate_to_neighbors(x: Tensor) -> Tensor:
    """`[n, C]` -> `(I + M) x` like x, where `M_ij = 2^-|i-j|`, 1 on the diagonal. In linear time in n, and twice
    differentiable; the sums are in float32 (float64 for float64) and rounded once."""
    check_tensor("propagate_to_neighbors", "x", x, ("n", "C"))
    up_to, from_on = _sweeps(x.to(computing_dtype(x.dtype)))
    return (up_to + from_on).to(x.dtype)


class _NeighboringTokenPropagation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, released: bool) -> Tensor:
        if not released:
            return table.clone()
        up_to, from_on = _sweeps(table.to(computing_dtype(table.dtype)))
        propagated = torch.cat([up_to[:-1] + from_on[1:] / 2, up_to[-1:]]).to(table.dtype)
        return (table + propagated) - propagated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        pass  # the map is linear: nothing to save

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return propagate_to_neighbors(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return propagate_to_neighbors(tangent)  # I + M is symmetric


def neighboring_token_propagation(table: Tensor, *, compat: str = "paper") -> Tensor:
    """`[n, C]` -> the same, exactly; but a gradient g of the result is one of `(I + M) g` of the table, where
    `M_ij = 2^-|i-j|` (1 on the diagonal): what one anchor learns, its neighbours learn by halves.

    The gradient is `propagate_to_neighbors(g)`. `compat="released"` gives `(W + R) - R` with `R = M W`, all three
    rounded to the dtype of the table (R from float32 sums), as published: W but for rounding. Same gradient.
    """
    check_tensor("neighboring_token_propagation", "table", table, ("n", "C"))
    if compat not in ("paper", "released"):
        raise ValueError(f'neighboring_token_propagation: compat must be "paper" or "released", got {compat!r}')
    return _NeighboringTokenPropagation.apply(table, compat == "released")
