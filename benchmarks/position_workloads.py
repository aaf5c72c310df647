"""LAPE's addition, the input embeddings and the coordinate loss: the calls to compare, at LLaVA-ST's sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import llava_st_ops
from llava_st_ops import reference

from .clip import Clip, patch_features
from .loss_peers import fused_losses
from .position_peers import chunked_loss, eager_add, eager_add_in_place, eager_scatter
from .workloads import (
    REFERENCE,
    Contender,
    Function,
    Workload,
    bytes_of,
    call_of,
    describe,
    on_each_backend,
    seeded,
    workload_of,
)

WIDTH = 3584  # of LLaVA-ST's language model
ANCHORS = 100
TOKENS, WORDS = 2700, 152064  # of the loss; the words are Qwen2's
_EAGER = "eager, as published"
_TABLES = ("grad_temporal", "grad_height", "grad_width")
ADDITION = ("output", "grad_features", *_TABLES)


@functools.lru_cache(maxsize=1)
def _features(clip: Clip, frames: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Features and tables, and a gradient."""
    features = patch_features(clip, frames, WIDTH, device).to(dtype)
    tables = [seeded((ANCHORS, WIDTH), seed, dtype, device) for seed in (1, 2, 3)]
    return [features, *tables], seeded(tuple(features.shape), 4, dtype, device)


def _add_case(device: torch.device) -> tuple[int, torch.dtype]:
    """Frames, and their dtype."""
    return (100, torch.bfloat16) if device.type == "cuda" else (40, torch.float32)


def addition_costs(mode: str, features: Tensor, tables: list[Tensor]) -> dict[str, object]:
    """Bytes of a case."""
    size, of_tables = bytes_of(features), bytes_of(*tables)
    backward = mode == "forward+backward"
    return {
        "bytes_read": size * (2 if backward else 1) + of_tables,
        "bytes_written": size + (of_tables if backward else 0),
        "bytes_counted": "features read and the result written once; backward: its gradient read once, those of the "
        "tables written",
    }


def addition_passes(tensors: list[Tensor], grad: Tensor) -> list[tuple[list[Tensor], list[int]]]:
    features, *tables = tensors
    return [([features], [bytes_of(features)]), ([grad], [bytes_of(*tables)])]


def _describe_add(mode: str, tensors: list[Tensor], dtype: torch.dtype) -> dict[str, object]:
    features, *tables = tensors
    frames = features.shape[1]
    return describe(
        f"lape_add {frames} frames",
        mode,
        dtype,
        "LLaVA-ST's grid and width",
        _EAGER,
        frames=frames,
        features_shape=list(features.shape),
        **addition_costs(mode, features, tables),
    )


def add_workload(mode: str, clip: Clip, device: torch.device) -> Workload:
    """`mode`: "forward" or "forward+backward"."""
    frames, dtype = _add_case(device)
    tensors, grad = _features(clip, frames, dtype, device)
    workload = workload_of(
        _describe_add(mode, tensors, dtype),
        ADDITION,
        tensors,
        (grad,),
        reference.lape_add,
        [
            *on_each_backend(llava_st_ops.lape_add, device, dtype),
            (_EAGER, "peer", eager_add),
            ("eager, compiled", "peer", torch.compile(eager_add, dynamic=False, fullgraph=True)),
        ],
        addition_passes(tensors, grad),
    )
    workload.contenders.append(Contender("clone", "yardstick", lambda: tensors[0].clone(), checked=False))
    return workload


def in_place_workload(clip: Clip, device: torch.device) -> Workload:
    """Each contender changes features of its own, and once more with every call: the first is compared."""
    frames, dtype = _add_case(device)
    tensors, _ = _features(clip, frames, dtype, device)
    features, *tables = tensors

    def contender(name: str, role: str, function: Function) -> Contender:
        own = [features.clone(), *tables]
        return Contender(name, role, call_of(function, own, own, None))

    copy = features.clone()
    return Workload(
        description=_describe_add("in place", tensors, dtype),
        contenders=[
            *(contender(*ours) for ours in on_each_backend(llava_st_ops.lape_add_, device, dtype)),
            contender(_EAGER, "peer", eager_add_in_place),
            Contender(REFERENCE, "reference", call_of(reference.lape_add, tensors, tensors, None)),
            Contender("copy into warm memory", "yardstick", lambda: copy.copy_(features), checked=False),
        ],
        truth=lambda: {"output": reference.lape_add(*(x.double() for x in tensors))},
        reference=REFERENCE,
        passes=[],
        dtype=dtype,
    )


def scatter_workload(clip: Clip, device: torch.device) -> Workload:
    """Four samples of 3,000 tokens: a video each, words, and coordinates."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples, length, video, words = 4, 3000, 2520, 32000
    generator = torch.Generator().manual_seed(0)
    sources = [seeded((n, WIDTH), seed, dtype, device) for seed, n in enumerate((words, ANCHORS, ANCHORS, ANCHORS))]
    sources.append(seeded((samples * video, WIDTH), 4, dtype, device))
    ids = torch.randint(0, words, (samples, length), generator=generator)
    axis = torch.full((samples, length), -1, dtype=torch.int8)
    axis[:, video::4] = torch.randint(0, 3, axis[:, video::4].shape, generator=generator).to(torch.int8)
    positions = torch.rand((samples, length), generator=generator, dtype=torch.float64)
    visual_index = torch.full((samples, length), -1)
    visual_index[:, :video] = torch.arange(samples * video).view(samples, video)
    tokens = [x.flatten().to(device) for x in (ids, axis, positions, visual_index)]

    def ours(*arguments: Tensor) -> Tensor:
        *rows, visual = arguments
        return llava_st_ops.lape_scatter(*rows, *tokens, visual)

    def plain(*arguments: Tensor) -> Tensor:
        *rows, visual = arguments
        return reference.lape_scatter(*rows, *tokens, visual)

    output = torch.empty(samples * length, WIDTH, dtype=dtype, device=device).copy_(plain(*sources))
    eager = "eager, vectorised"
    return Workload(
        description=describe(
            f"lape_scatter {samples} x {length} tokens",
            "forward",
            dtype,
            "a batch of LLaVA-ST's samples: 2,520 visual tokens each, words, and a coordinate every fourth",
            eager,
            bytes_read=bytes_of(output),
            bytes_written=bytes_of(output),
            bytes_counted="a row read and written per token",
        ),
        contenders=[
            *(
                Contender(name, role, call_of(function, sources, sources, None))
                for name, role, function in on_each_backend(ours, device, dtype)
            ),
            Contender(REFERENCE, "reference", call_of(plain, sources, sources, None)),
            Contender(eager, "peer", call_of(lambda *x: eager_scatter(*x, *tokens), sources, sources, None)),
            Contender("clone", "yardstick", lambda: output.clone(), checked=False),
        ],
        truth=lambda: {"output": plain(*(x.double() for x in sources))},
        reference=REFERENCE,
        passes=[([output], [bytes_of(output)])],
        dtype=dtype,
    )


def loss_workload(clip: Clip, device: torch.device) -> Workload:
    """Words and positions anywhere between anchors."""
    return _loss_workload(device, hard=False)


def hard_loss_workload(clip: Clip, device: torch.device) -> Workload:
    """Words and positions at anchors, which are ordinary labels: what fused losses of others compute, too. These take
    all classes as one table, which is made before the clock starts."""
    return _loss_workload(device, hard=True)


def _loss_workload(device: torch.device, hard: bool) -> Workload:
    """2,700 tokens over the vocabulary of Qwen2: on a CPU with a tenth of the width, which it can afford."""
    gpu = device.type == "cuda"
    dtype, width, chunk = (torch.bfloat16, WIDTH, 1024) if gpu else (torch.float32, 256, 256)
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, width), (WORDS, width), *[(ANCHORS, width)] * 3]
    sources = [seeded(s, i, dtype, device).mul_(0.05 if i else 1).requires_grad_() for i, s in enumerate(shapes)]
    axis = torch.randint(-3, 3, (TOKENS,), generator=generator).clamp(min=-1).to(torch.int8)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    positions = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    if hard:
        anchor = torch.randint(0, ANCHORS, (TOKENS,), generator=generator)
        positions = anchor.double() / (ANCHORS - 1)
        classes = labels.where(axis < 0, WORDS + axis.long() * ANCHORS + anchor)
    tokens = [x.to(device) for x in (labels, axis, positions)]
    one = (torch.ones((), dtype=torch.float32, device=device),)
    baseline = "chunked PyTorch"

    def ours(*arguments: Tensor) -> Tensor:
        return llava_st_ops.coordinate_cross_entropy(*arguments, *tokens)

    def chunked(*arguments: Tensor) -> Tensor:
        return chunked_loss(*arguments, *tokens, chunk=chunk)

    def truth() -> dict[str, Tensor]:
        wide = [x.detach().double().requires_grad_() for x in sources]
        results = call_of(chunked, wide, wide, (one[0].double(),))()
        return dict(zip(("loss", "grad_hidden", "grad_weight", *_TABLES), results, strict=True))

    others = _fused_contenders(sources, classes.to(device), one) if hard else []
    return Workload(
        description=describe(
            f"coordinate_cross_entropy {TOKENS} tokens x {WORDS} + {3 * ANCHORS} classes, "
            f"{'hard labels, ' if hard else ''}width {width}",
            "forward+backward",
            dtype,
            "positions at anchors, for comparison with fused losses that know ordinary labels only; these take all "
            "classes as one table, made beforehand"
            if hard
            else "a sample of LLaVA-ST with Qwen2's vocabulary",
            baseline,
            flops=3 * 2 * TOKENS * (WORDS + 3 * ANCHORS) * width,
            flops_counted="logits and the gradients of both factors; logits that are computed again do not count",
        ),
        contenders=[
            *(
                Contender(name, role, call_of(function, sources, sources, one))
                for name, role, function in on_each_backend(ours, device, dtype)
            ),
            Contender(baseline, "peer", call_of(lambda *rows: chunked(*rows).float(), sources, sources, one)),
            *others,
        ],
        truth=truth,
        reference=baseline,
        passes=[],
        dtype=dtype,
        rounds=None if gpu else 3,
    )


def _fused_contenders(sources: list[Tensor], labels: Tensor, grads: tuple[Tensor, ...]) -> list[Contender]:
    """Losses of others, on the tables of `sources` as one."""
    hidden, *tables = sources
    leaves = [hidden, torch.cat(tables).detach().requires_grad_()]

    def contender(name: str, loss: Function) -> Contender:
        call = call_of(lambda *rows: loss(*rows, labels).float(), leaves, leaves, grads)

        def with_separate_gradients() -> tuple[Tensor, ...]:
            value, grad_hidden, grad_classes = call()
            return value, grad_hidden, *grad_classes.split([len(table) for table in tables])

        return Contender(name, "peer", with_separate_gradients)

    return [
        Contender(name, "peer", None, found) if isinstance(found, str) else contender(name, found)
        for name, found in fused_losses(hidden.device).items()
    ]


# Name, builder, and whether the memory that results lie on matters: then it is measured with huge pages, too.
BUILDERS: dict[str, tuple[Callable[[Clip, torch.device], Workload], bool]] = {
    "lape_add, forward": (functools.partial(add_workload, "forward"), True),
    "lape_add, in place": (in_place_workload, False),
    "lape_add, forward+backward": (functools.partial(add_workload, "forward+backward"), True),
    "lape_scatter, forward": (scatter_workload, True),
    "coordinate_cross_entropy, forward+backward": (loss_workload, False),
    "coordinate_cross_entropy, hard labels, forward+backward": (hard_loss_workload, False),
}
