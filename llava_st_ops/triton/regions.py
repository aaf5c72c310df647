"""Index arithmetic of point-to-region attention inside Triton kernels: which tokens belong to the query of a program.

Also the two small kernels that are index arithmetic and nothing else: where packed videos begin, and zero gradients of
tokens that belong to no query. What there is of packed videos, lape_add uses too: to it every token is a region.

Offsets into tensors are int64. Kernels over packed videos read the grids on the device, and nobody may have checked
them: whatever they hold, offsets stay inside the tensors and loops end.
"""

# ruff: noqa: N803 (constants are in capitals, as everywhere in Triton)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """How queries and tokens lie in their tensors, dense or packed; what belongs to the other form is None.

    Kernels specialise on its numbers only where they are 1, so that a new shape seldom means a new compilation.
    """

    queries: int  # of all samples or videos
    tokens: int  # of all samples or videos
    region: tuple[int, int, int]
    # Dense: every sample has the same grid of tokens, and of regions.
    grid: tuple[int, int, int] | None = None
    regions: tuple[int, int, int] | None = None
    # Packed: grids on the device, `[videos, 3]`, and where their videos begin (`video_offsets_kernel`).
    grid_thw: Any = None
    grid_strides: tuple[int, int] | None = None
    offsets: Any = None
    videos: int | None = None
    search_steps: int | None = None


class Place(NamedTuple):
    """Where a query and its region are: scalars, all int64 but for the sizes."""

    sample: Any  # place of the query in its tensor; a packed one lies at (0, 0, 0, number)
    at_t: Any
    at_h: Any
    at_w: Any
    key: Any  # offset of the region's first token in key
    value: Any  # the same in value
    token: Any  # number of the region's first token
    hw: Any  # tokens of a frame
    w: Any  # tokens of a row of a frame
    size_t: Any  # of the region, clipped at the edge of the grid
    size_h: Any
    size_w: Any


@triton.jit
def ceil_div(a, b):
    return (a + (b - 1)) // b


@triton.jit
def capped_product(a, b, limit):
    """`min(a * b, limit)` for `a` and `b` in [0, limit], however large the product."""
    return tl.where(a > limit // tl.maximum(b, 1), limit, a * b)


@triton.jit
def load_grid(layout, video, limit, mask):
    """Sizes (T, H, W) of one or several videos in int64, clamped to [0, limit].

    With a limit beyond the number of tokens, the clamp moves no token that exists: it keeps products of a wrong grid
    from overflowing.
    """
    row = layout.grid_thw + video.to(tl.int64) * layout.grid_strides[0]
    t = tl.load(row, mask=mask, other=0).to(tl.int64)
    h = tl.load(row + layout.grid_strides[1], mask=mask, other=0).to(tl.int64)
    w = tl.load(row + layout.grid_strides[1] * 2, mask=mask, other=0).to(tl.int64)
    t = tl.minimum(tl.maximum(t, 0), limit)
    h = tl.minimum(tl.maximum(h, 0), limit)
    w = tl.minimum(tl.maximum(w, 0), limit)
    return t, h, w


@triton.jit
def past_the_end(layout):
    """A count that is more than the tokens and the queries there are, int64."""
    return tl.full([], 1, tl.int64) + tl.maximum(layout.tokens, layout.queries)


@triton.jit(do_not_specialize=["layout"])
def video_offsets_kernel(layout, BLOCK: tl.constexpr):
    """Writes `layout.offsets`, int64 `[videos + 1, 2]`: the first token and the first query of every video, and the
    totals. One program.

    A video counts as at most `past_the_end` tokens and queries, so that the offsets ascend whatever the grids hold.
    """
    limit = past_the_end(layout)
    total_tokens = limit * 0
    total_queries = limit * 0
    for start in range(0, layout.videos, BLOCK):
        video = start + tl.arange(0, BLOCK)
        mask = video < layout.videos
        t, h, w = load_grid(layout, video, limit, mask)
        tokens = capped_product(capped_product(t, h, limit), w, limit)
        queries = capped_product(ceil_div(t, layout.region[0]), ceil_div(h, layout.region[1]), limit)
        queries = capped_product(queries, ceil_div(w, layout.region[2]), limit)
        entry = layout.offsets + video.to(tl.int64) * 2
        tl.store(entry, total_tokens + tl.cumsum(tokens, 0) - tokens, mask=mask)
        tl.store(entry + 1, total_queries + tl.cumsum(queries, 0) - queries, mask=mask)
        total_tokens += tl.sum(tokens, 0)
        total_queries += tl.sum(queries, 0)
    totals = layout.offsets + (limit * 0 + layout.videos) * 2
    tl.store(totals, total_tokens)
    tl.store(totals + 1, total_queries)


@triton.jit
def video_of_query(layout, query):
    """The last video that begins at or before a query, or each of several: where `query` is below the total, it is the
    query's own.

    `search_steps` is `videos.bit_length()`. Once one video is left the middle is that video, and nothing moves.
    """
    low = tl.cast(query * 0, tl.int64)
    high = low + layout.videos
    for _ in range(layout.search_steps):
        middle = (low + high) // 2
        not_after = tl.load(layout.offsets + middle * 2 + 1) <= query
        low = tl.where(not_after, middle, low)
        high = tl.where(not_after, high, middle)
    return low


@triton.jit
def _packed_place(layout, query, key_strides, value_strides, SINGLE_TILE: tl.constexpr, WIDE: tl.constexpr):
    """The place of packed query number `query`. The region is empty where the query lies past the last video, or the
    region past the last token."""
    video = video_of_query(layout, query)
    entry = layout.offsets + video * 2
    exists = query < tl.load(layout.offsets + (video * 0 + layout.videos) * 2 + 1)
    limit = past_the_end(layout)
    t, h, w = load_grid(layout, video, limit, exists)
    hw = capped_product(h, w, limit)
    at = query - tl.load(entry + 1)
    token = tl.load(entry)
    if not WIDE:  # 64-bit divisions are slow, and nothing here exceeds the limit
        t, h, w, hw, at = t.to(tl.int32), h.to(tl.int32), w.to(tl.int32), hw.to(tl.int32), at.to(tl.int32)
    regions_h = tl.maximum(ceil_div(h, layout.region[1]), 1)
    regions_w = tl.maximum(ceil_div(w, layout.region[2]), 1)
    first_t = at // regions_w // regions_h * layout.region[0]
    first_h = at // regions_w % regions_h * layout.region[1]
    first_w = at % regions_w * layout.region[2]
    hw, w = hw.to(tl.int64), w.to(tl.int64)
    token += first_t * hw + first_h * w + first_w
    exists = exists & (token < layout.tokens)
    size_t = tl.where(exists, tl.minimum(layout.region[0], t - first_t), 0)
    size_h = tl.where(exists, tl.minimum(layout.region[1], h - first_h), 0)
    size_w = tl.where(exists, tl.minimum(layout.region[2], w.to(t.dtype) - first_w), 0)
    if not SINGLE_TILE:
        # Where a wrong grid reaches beyond the last token, so would the loop over tiles.
        left = tl.where(exists, layout.tokens - token, 0)
        size_t = tl.minimum(size_t, ceil_div(left, tl.maximum(hw, 1))).to(t.dtype)
        size_h = tl.minimum(size_h, ceil_div(left, tl.maximum(w, 1))).to(t.dtype)
        size_w = tl.minimum(size_w, left).to(t.dtype)
    return Place(
        sample=video * 0,
        at_t=video * 0,
        at_h=video * 0,
        at_w=query.to(tl.int64),
        key=token * key_strides[3],
        value=token * value_strides[3],
        token=token,
        hw=hw,
        w=w,
        size_t=size_t,
        size_h=size_h,
        size_w=size_w,
    )


@triton.jit
def offset_at(strides, sample, t, h, w):
    return sample * strides[0] + t * strides[1] + h * strides[2] + w * strides[3]


@triton.jit
def _dense_place(layout, query, key_strides, value_strides):
    """The place of query number `query`, counted through all samples."""
    at_w = query % layout.regions[2]
    at_h = query // layout.regions[2] % layout.regions[1]
    at_t = query // layout.regions[2] // layout.regions[1] % layout.regions[0]
    sample = (query // layout.regions[2] // layout.regions[1] // layout.regions[0]).to(tl.int64)
    first_t, first_h, first_w = at_t * layout.region[0], at_h * layout.region[1], at_w * layout.region[2]
    size_t = tl.minimum(layout.region[0], layout.grid[0] - first_t)
    size_h = tl.minimum(layout.region[1], layout.grid[1] - first_h)
    size_w = tl.minimum(layout.region[2], layout.grid[2] - first_w)
    at_t, at_h, at_w = at_t.to(tl.int64), at_h.to(tl.int64), at_w.to(tl.int64)
    first_t, first_h, first_w = first_t.to(tl.int64), first_h.to(tl.int64), first_w.to(tl.int64)
    w = tl.full([], 0, tl.int64) + layout.grid[2]
    return Place(
        sample=sample,
        at_t=at_t,
        at_h=at_h,
        at_w=at_w,
        key=offset_at(key_strides, sample, first_t, first_h, first_w),
        value=offset_at(value_strides, sample, first_t, first_h, first_w),
        token=((sample * layout.grid[0] + first_t) * layout.grid[1] + first_h) * layout.grid[2] + first_w,
        hw=w * layout.grid[1],
        w=w,
        size_t=size_t,
        size_h=size_h,
        size_w=size_w,
    )


@triton.jit
def program_number(WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:  # more programs than one axis holds
        program = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return program


@triton.jit
def place_of_query(layout, query, key_strides, value_strides, SINGLE_TILE: tl.constexpr, WIDE: tl.constexpr):
    if layout.grid is None:
        return _packed_place(layout, query, key_strides, value_strides, SINGLE_TILE, WIDE)
    else:
        return _dense_place(layout, query, key_strides, value_strides)


@triton.jit
def tile_of_region(
    layout,
    place,
    start,
    key_strides,
    value_strides,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
):
    """Keys `start` to `start + BLOCK_K` of a region: offsets in key and value, numbers, and which of them exist,
    all `[BLOCK_K]`."""
    j = start + tl.arange(0, BLOCK_K)
    if SINGLE_TILE:
        # The tile is the region before clipping. With its size constant, little of this is left to run time, and the
        # compiler drops the loads that pad the tile to a power of two.
        j_t, j_h, j_w = j // (TILE_H * TILE_W), j // TILE_W % TILE_H, j % TILE_W
        exists = (j < TILE_T * TILE_H * TILE_W) & (j_t < place.size_t) & (j_h < place.size_h) & (j_w < place.size_w)
    else:
        # Tiles cut the clipped region, so that a small grid in a huge region takes few.
        j_t = j // (place.size_h * place.size_w)
        j_h = j // place.size_w % place.size_h
        j_w = j % place.size_w
        exists = j_t < place.size_t
    j_t, j_h, j_w = j_t.to(tl.int64), j_h.to(tl.int64), j_w.to(tl.int64)
    relative = j_t * place.hw + j_h * place.w + j_w
    token = place.token + relative
    if layout.grid is None:
        exists = exists & (token < layout.tokens)
        key_offset = place.key + relative * key_strides[3]
        value_offset = place.value + relative * value_strides[3]
    else:
        key_offset = place.key + j_t * key_strides[1] + j_h * key_strides[2] + j_w * key_strides[3]
        value_offset = place.value + j_t * value_strides[1] + j_h * value_strides[2] + j_w * value_strides[3]
    return key_offset, value_offset, token, exists


@triton.jit
def _zero_rows(pointer, token, mask, row_size, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    for column in range(0, row_size, BLOCK_COLUMNS):
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        zeros = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], pointer.dtype.element_ty)
        offsets = token[:, None] * row_size + columns[None, :]
        tl.store(pointer + offsets, zeros, mask=mask[:, None] & (columns < row_size)[None, :])


@triton.jit(do_not_specialize=["layout"])
def zero_uncovered_kernel(
    grad_key,
    grad_value,
    grad_bias,
    layout,
    key_row,
    value_row,
    bias_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Zeros the gradients `[tokens, .._row]` of the tokens that no query attends to, and touches no others. Where there
    is no bias, `grad_bias` is None.

    Those are the tokens past the last video, and those of regions past the last query. How many there are is known on
    the device alone, so the programs share them in strides; with correct grids there are none.
    """
    total_tokens = tl.load(layout.offsets + (tl.full([], 0, tl.int64) + layout.videos) * 2)
    total_queries = tl.load(layout.offsets + (tl.full([], 0, tl.int64) + layout.videos) * 2 + 1)
    missing = layout.queries < total_queries
    # The first video with a region that has no query: earlier ones are covered, later ones are not.
    video = tl.where(missing, video_of_query(layout, layout.queries), 0)
    entry = layout.offsets + video * 2
    video_token = tl.load(entry)
    video_query = tl.load(entry + 1)
    limit = past_the_end(layout)
    t, h, w = load_grid(layout, video, limit, missing)
    hw = tl.maximum(capped_product(h, w, limit), 1)
    video_end = tl.where(missing, video_token + capped_product(t, hw, limit), total_tokens)
    w = tl.maximum(w, 1)
    regions_h = ceil_div(h, layout.region[1])
    regions_w = ceil_div(w, layout.region[2])
    first = tl.where(missing, video_token, total_tokens)
    for start in range(first + tl.program_id(0) * BLOCK_ROWS, layout.tokens, tl.num_programs(0) * BLOCK_ROWS):
        token = start + tl.arange(0, BLOCK_ROWS)
        at = token - video_token
        at_t, at_h, at_w = at // hw // layout.region[0], at % hw // w // layout.region[1], at % w // layout.region[2]
        query = video_query + (at_t * regions_h + at_h) * regions_w + at_w
        uncovered = (token < layout.tokens) & ((token >= video_end) | (query >= layout.queries))
        _zero_rows(grad_key, token, uncovered, key_row, BLOCK_ROWS, BLOCK_COLUMNS)
        _zero_rows(grad_value, token, uncovered, value_row, BLOCK_ROWS, BLOCK_COLUMNS)
        if grad_bias is not None:
            _zero_rows(grad_bias, token, uncovered, bias_row, BLOCK_ROWS, BLOCK_COLUMNS)
