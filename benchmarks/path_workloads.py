"""The whole path from vision features to tokens at LLaVA-ST's sizes: ours, folded and direct, and the published way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llava_st_ops import use_backend

from .cases import MODES
from .clip import GRID, Clip, patch_features
from .path_published import PublishedPath, tokenizer_like
from .workloads import Contender, Workload, call_of

VISION, WIDTH, EMBED, HEADS, ANCHORS = 1152, 3584, 1024, 8, 100
BASELINE = "published path, eager"
FOLDED, DIRECT = "llava_st_ops.nn, folded", "llava_st_ops.nn, direct"
YARDSTICK = "matrix product"


def path_cases(device: torch.device, asked_for: bool) -> list[tuple[int, str]]:
    """Frames and mode. A call takes seconds on a CPU: all cases, with the lengths that show how time grows with them,
    run only where they are asked for."""
    if device.type == "cuda":
        lengths, usual = (8, 16, 40, 400, 1600), 100
    else:
        lengths, usual = (5, 30), 15
    if not asked_for and device.type != "cuda":
        return [(usual, "forward")]
    return [*((usual, mode) for mode in MODES), *((frames, "forward") for frames in lengths)]


def path_flops(frames: int, mode: str, folded: bool) -> int:
    """Of the matrix products, from shapes alone, by torch's counter. The backward pass is that of all parameters but
    the projector's; the folded one includes the products of weights with weights, unless they are kept (forward)."""
    backward = mode != "forward"
    with torch.device("meta"):
        published = PublishedPath(VISION, WIDTH, EMBED, HEADS, ANCHORS)
        module: nn.Module = tokenizer_like(published, chunk_tokens=0) if folded else published
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("reference"):
        module = module.to_empty(device="cpu")
        module = module.freeze() if folded and not backward else module
        features = torch.empty(1, frames, GRID, GRID, VISION)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            outputs = module(features)
            if backward:
                sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops()


def path_workload(frames: int, mode: str, clip: Clip, device: torch.device) -> Workload:
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    dtype_name = str(dtype).removeprefix("torch.")
    backward = mode != "forward"
    torch.manual_seed(6)
    published = PublishedPath(VISION, WIDTH, EMBED, HEADS, ANCHORS).to(device, dtype)
    ours = {name: tokenizer_like(published, execution=name.split()[-1]) for name in (FOLDED, DIRECT)}
    features = patch_features(clip, frames, VISION, device).to(dtype)
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, -(-frames // 5), 9, 9, WIDTH), (1, frames, 3, 3, WIDTH)]
    grads = tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)

    def contender(name: str, role: str, module: nn.Module, run: object = None) -> Contender:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return Contender(
            name, role, call_of(module if run is None else run, [features], trained, grads if backward else None)
        )

    def truth() -> dict[str, Tensor]:
        # Gradients are timed; compared are the results. (In float64 the whole of it takes minutes.)
        exact = copy.deepcopy(published).double()
        with torch.no_grad():
            return dict(zip(("slow", "fast"), exact(features.double()), strict=True))

    compiled = torch.compile(published, mode="max-autotune" if gpu else None, dynamic=False)
    side, middle, columns = (8192, 8192, 8192) if gpu else (4096, WIDTH, 2048)
    factors = [torch.randn(shape).to(device, dtype) for shape in ((side, middle), (middle, columns))]
    description = {
        "name": f"path {frames} frames, {mode}, {dtype_name}",
        "kind": "path",
        "frames": frames,
        "dtype": dtype_name,
        "mode": mode,
        "features_shape": list(features.shape),
        "reason": "LLaVA-ST's sizes, and its projector, which is frozen",
        "baseline": BASELINE,
        "flops": path_flops(frames, mode, folded=False),
        "flops_folded": path_flops(frames, mode, folded=True),
        "flops_counted": "matrix products, from shapes, by torch.utils.flop_counter; backward: of all parameters but "
        "the projector's",
        "yardstick_flops": 2 * side * middle * columns,
    }
    return Workload(
        description=description,
        contenders=[
            *(contender(name, "ours", module) for name, module in ours.items()),
            contender(BASELINE, "peer", published),
            contender("published path, compiled", "peer", published, compiled),
            Contender(YARDSTICK, "yardstick", lambda: factors[0] @ factors[1], checked=False),
        ],
        truth=truth,
        reference=BASELINE,
        passes=[],
        dtype=dtype,
        rounds=None if gpu else 5 if frames == 15 else 3,
    )
