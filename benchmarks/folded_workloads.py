"""The two ops of a folded packer: its MLPs with positions inside, and attention over normalised keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

import llava_st_ops
from llava_st_ops import reference

from .cases import BYTES_COUNTED, MODES
from .clip import GRID, Clip, patch_features
from .parity import TENSORS
from .workloads import Contender, Workload, bytes_of, describe, on_each_backend, seeded, workload_of

VISION, EMBED, HEADS, EPS = 1152, 1024, 8, 1e-5  # LLaVA-ST's
REGION = (1, 3, 3)


def _frames_and_dtype(device: torch.device) -> tuple[int, torch.dtype]:
    return (100, torch.bfloat16) if device.type == "cuda" else (15, torch.float32)


def _windows(x: Tensor) -> Tensor:
    """`[1, T, H, W, E]` to `[regions, 1, keys, E]`."""
    _, rh, rw = REGION
    x = x[0].unflatten(2, (-1, rw)).unflatten(1, (-1, rh)).transpose(2, 3)
    return x.reshape(-1, 1, rh * rw, x.shape[-1])


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """LayerNorms, then SDPA of a region's heads as queries of one head."""
    keys, values = (_windows(layer_norm(x, x.shape[-1:], eps=EPS)) for x in (key, value))
    queries = query.reshape(-1, 1, *query.shape[-2:])
    return scaled_dot_product_attention(queries, keys, values, scale=1.0).view(query.shape)


def attention_workload(mode: str, clip: Clip, device: torch.device) -> Workload:
    """Spatial regions of `normalized_region_attention`."""
    frames, dtype = _frames_and_dtype(device)
    backward = mode != "forward"
    key = patch_features(clip, frames, EMBED, device).to(dtype)
    shape = (1, frames, GRID // REGION[1], GRID // REGION[2], HEADS, EMBED)
    tensors = [seeded(shape, 1, dtype, device) * EMBED**-0.5, key, key.flip(-1).contiguous()]
    grad = seeded(shape, 2, dtype, device)

    def ours(*tensors: Tensor) -> Tensor:
        return llava_st_ops.normalized_region_attention(*tensors, REGION, EPS)

    def plain(*tensors: Tensor) -> Tensor:
        return reference.normalized_region_attention(*tensors, REGION, EPS)

    baseline = "LayerNorms, then SDPA"
    query, *_ = sizes = [bytes_of(x) for x in tensors]
    torch.compiler.reset()  # what was compiled for earlier cases
    return workload_of(
        describe(
            f"normalized_region_attention {frames} frames",
            mode,
            dtype,
            "LLaVA-ST's spatial packer, folded",
            baseline,
            frames=frames,
            bytes_read=sum(sizes) + (sum(sizes) + query if backward else 0),
            bytes_written=query + (sum(sizes) if backward else 0),
            bytes_counted=BYTES_COUNTED[mode],
        ),
        TENSORS,
        tensors,
        (grad,),
        plain,
        [
            *on_each_backend(ours, device, dtype),
            (baseline, "peer", eager_attention),
            (f"{baseline}, compiled", "peer", torch.compile(eager_attention, dynamic=False, fullgraph=True)),
        ],
        [(tensors, sizes[:1]), ([*tensors, grad], sizes)],
    )


def eager_mlp(features: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """One product, additions, the GELU, and a product for each of two MLPs."""
    temporal, height, width, *second = rest
    positions = temporal[:, None, None] + height[:, None] + width
    hidden = gelu(linear(features, weight, bias) + positions).chunk(2, -1)
    return tuple(linear(x, w, b) for x, w, b in zip(hidden, second[:2], second[2:], strict=True))


def mlp_workload(mode: str, clip: Clip, device: torch.device) -> Workload:
    """`lape_mlp` for keys and values."""
    frames, dtype = _frames_and_dtype(device)
    both = 2 * EMBED
    # First weight and bias, positions, second weights and biases: shape, and size of their numbers.
    parts = [((both, VISION), VISION**-0.5), ((both,), 0.1), *(((n, both), 0.1) for n in (frames, GRID, GRID))]
    parts += [*[((EMBED, EMBED), EMBED**-0.5)] * 2, *[((EMBED,), 0.1)] * 2]
    tensors = [patch_features(clip, frames, VISION, device).to(dtype)]
    tensors += [seeded(shape, seed, dtype, device) * size for seed, (shape, size) in enumerate(parts)]
    grads = tuple(seeded((1, frames, GRID, GRID, EMBED), seed, dtype, device) for seed in (20, 21))

    def ours(features: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return llava_st_ops.lape_mlp(features, weight, bias, rest[:3], rest[3:5], rest[5:])

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        with llava_st_ops.use_backend("reference"):
            return ours(*tensors)

    rows = frames * GRID * GRID
    factors = [seeded(shape, 30, dtype, device) for shape in ((rows, VISION), (VISION, both))]
    baseline = "eager, layer by layer"
    torch.compiler.reset()
    workload = workload_of(
        describe(
            f"lape_mlp {frames} frames",
            mode,
            dtype,
            "keys and values of LLaVA-ST's spatial packer, folded",
            baseline,
            frames=frames,
            flops=2 * rows * both * (VISION + EMBED) * (1 if mode == "forward" else 3),
            flops_counted="matrix products; backward: of the gradients of features and weights",
            yardstick_flops=2 * rows * both * VISION,
        ),
        ("key", "value", "grad_features"),
        tensors,
        grads,
        plain,
        [
            *on_each_backend(ours, device, dtype),
            (baseline, "peer", eager_mlp),
            ("eager, compiled", "peer", torch.compile(eager_mlp, dynamic=False, fullgraph=True)),
        ],
        rounds=None if device.type == "cuda" else 5,
    )
    product = Contender("matrix product", "yardstick", lambda: factors[0] @ factors[1], checked=False)
    workload.contenders.append(product)
    return workload


# As in position_workloads.
BUILDERS: dict[str, tuple[Callable[[Clip, torch.device], Workload], bool]] = {
    f"{name}, {mode}": (functools.partial(build, mode), on_huge_pages)
    for name, build, on_huge_pages in (
        ("normalized_region_attention", attention_workload, True),
        ("lape_mlp", mlp_workload, False),
    )
    for mode in MODES
}
