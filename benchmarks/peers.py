"""Other ways to compute point-to-region attention, from the published one to compiled and block-sparse ones.

All take query `[B, T', H', W', heads, D]`, key and value `[B, T, H, W, heads, D]` and do what lies between the
projections: permutes, scores, softmax, weighted sum. Regions must divide the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import llava_st_ops
from llava_st_ops.backends import BACKENDS, can_run

from .cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Region = tuple[int, int, int]


@dataclass
class Implementation:
    """One way to compute a case: a function, or the reason why there is none."""

    name: str
    role: str  # "ours", "reference" or "peer"
    attention: Attention | None
    reason: str = ""


def _split(x: Tensor, region: Region) -> Tensor:
    """`[B, T, H, W, heads, D]` to a view `[B, T', rt, H', rh, W', rw, heads, D]`."""
    rt, rh, rw = region
    return x.unflatten(3, (-1, rw)).unflatten(2, (-1, rh)).unflatten(1, (-1, rt))


def eager(query: Tensor, key: Tensor, value: Tensor, region: Region) -> Tensor:
    """As published: flattened regions, batch second, then what torch's multi-head attention does to return weights.

    The published call also averages the weights over the heads, which nothing uses; that is left out here.
    """
    heads, dim = query.shape[-2:]
    window = region[0] * region[1] * region[2]

    def flatten(x: Tensor) -> Tensor:
        """To `[window, regions, E]`, regions in the order row, column, batch, time."""
        return _split(x, region).permute(2, 4, 6, 3, 5, 0, 1, 7, 8).reshape(window, -1, heads * dim)

    queries = query.permute(2, 3, 0, 1, 4, 5)
    order = queries.shape
    q = queries.reshape(1, -1, dim).transpose(0, 1) * dim**-0.5
    k = flatten(key).view(window, -1, dim).transpose(0, 1)
    v = flatten(value).view(window, -1, dim).transpose(0, 1)
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).view(order).permute(2, 3, 0, 1, 4, 5).contiguous()


def sdpa(query: Tensor, key: Tensor, value: Tensor, region: Region, bias: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention with one batch entry per region; bias `[B, T, H, W, heads or 1]`."""
    heads, dim = query.shape[-2:]
    window = region[0] * region[1] * region[2]

    def gather(x: Tensor) -> Tensor:
        return _split(x, region).permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, x.shape[-2], window, x.shape[-1])

    q = query.reshape(-1, heads, 1, dim)
    mask = None if bias is None else gather(bias[..., None]).transpose(2, 3)
    return torch.nn.functional.scaled_dot_product_attention(q, gather(key), gather(value), mask).view(query.shape)


def multiply_and_sum(query: Tensor, key: Tensor, value: Tensor, region: Region, bias: Tensor | None = None) -> Tensor:
    """Broadcast products and sums, without a copy: what one would write by hand for torch.compile."""
    query = (query * query.shape[-1] ** -0.5).unsqueeze(4).unsqueeze(3).unsqueeze(2)
    scores = (query * _split(key, region)).sum(-1, keepdim=True)
    if bias is not None:
        scores = scores + _split(bias[..., None], region)
    inside = (2, 4, 6)
    weights = (scores - scores.amax(inside, keepdim=True)).exp()
    weights = weights / weights.sum(inside, keepdim=True)
    return (weights * _split(value, region)).sum(inside)


def einsum(query: Tensor, key: Tensor, value: Tensor, region: Region) -> Tensor:
    """The same in two einsums."""
    scores = torch.einsum("bthwnd,btihjwknd->bthwnijk", query * query.shape[-1] ** -0.5, _split(key, region))
    weights = scores.flatten(-3).softmax(-1).view(scores.shape)
    return torch.einsum("bthwnijk,btihjwknd->bthwnd", weights, _split(value, region))


def flex_attention(case: Case, device: torch.device) -> Attention:
    """FlexAttention over all queries and keys, with a block mask that leaves each query its region."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    frames, height, width = case.key_shape[1:4]
    regions = torch.arange(case.query_shape[1] * case.query_shape[2] * case.query_shape[3], device=device)
    region_of_key = regions.view(case.query_shape[1:4])
    for axis, step in enumerate(case.region):
        region_of_key = region_of_key.repeat_interleave(step, axis)
    region_of_key = region_of_key.flatten()

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return region_of_key[key_index] == query_index

    # Which blocks of keys a block of queries needs follows from the geometry. create_block_mask would evaluate the
    # mask for all pairs, several GB at 100 frames.
    block = 128
    keys = torch.arange(frames * height * width, device=device)
    needed = torch.zeros(-(-len(regions) // block), -(-len(keys) // block), dtype=torch.bool, device=device)
    needed[region_of_key // block, keys // block] = True
    counts = needed.sum(-1, dtype=torch.int32)[None, None]
    order = needed.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None]
    block_mask = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(len(regions), len(keys))
    )
    compiled = torch.compile(flex, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (query, key, value))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2).reshape(query.shape)

    return attention


def _compiled(function: Callable[..., Tensor], region: Region) -> Attention:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda query, key, value: compiled(query, key, value, region)


def _bound(function: Callable[..., Tensor], region: Region) -> Attention:
    return lambda query, key, value: function(query, key, value, region)


def with_backend(backend: str, region: Region) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with llava_st_ops.use_backend(backend):
            return llava_st_ops.point_to_region_attention(query, key, value, region)

    return attention


def available_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Every backend but the reference: "" where it can run, else the reason why not."""
    verdicts = {b: can_run(b, "point_to_region_attention", device, dtype) for b in BACKENDS if b != "reference"}
    return {backend: "" if verdict.ok else verdict.reason for backend, verdict in verdicts.items()}


def implementations(case: Case, device: torch.device) -> list[Implementation]:
    """Every way to compute the case on this machine: our backends, the reference and the peers.

    Forgets what was compiled for earlier cases, so that a new shape neither recompiles for all shapes nor hits the
    limit of recompilations.
    """
    torch.compiler.reset()
    region = case.region
    ours = [
        Implementation(f"llava_st_ops, {backend}", "ours", with_backend(backend, region))
        for backend, reason in available_backends(device, case.dtype).items()
        if not reason
    ]
    reference = Implementation(
        "reference, PyTorch", "reference", _bound(llava_st_ops.reference.point_to_region_attention, region)
    )
    as_published = Implementation("eager, as published", "peer", _bound(eager, region))
    if device.type == "cpu" and case.dtype != torch.float32:
        return [*ours, reference, as_published]
    flex = Implementation("FlexAttention", "peer", None)
    if device.type == "cpu" and case.mode != "forward":
        flex.reason = "FlexAttention has no backward pass on a CPU"
    else:
        try:
            flex.attention = flex_attention(case, device)
        except Exception as error:  # its interface still moves between versions of torch
            flex.reason = f"{type(error).__name__}: {error}"
    return [
        *ours,
        reference,
        as_published,
        Implementation("SDPA on permuted tensors", "peer", _bound(sdpa, region)),
        Implementation("multiply-and-sum, compiled", "peer", _compiled(multiply_and_sum, region)),
        Implementation("einsum, compiled", "peer", _compiled(einsum, region)),
        flex,
    ]
