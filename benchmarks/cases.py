"""What is measured: shapes with a reason each, and the bytes and FLOPs that each one moves and needs at least."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .clip import GRID

HEADS, HEAD_DIM = 8, 128
MODES = ("forward", "forward+backward")

BYTES_COUNTED = {
    "forward": "query, key and value read once, the output written once",
    "forward+backward": "forward: query, key and value read, the output written; backward: query, key, value and the "
    "output's gradient read, the gradients of query, key and value written; each once",
}
FLOPS_COUNTED = {
    "forward": "scores and weighted sum: 2 x 2 per key element",
    "forward+backward": "forward, and in the backward pass scores again, gradients of weights, values, keys and query: "
    "7 x 2 per key element",
}


@dataclass(frozen=True)
class Case:
    """One shape of point-to-region attention in one dtype, forward or with the backward pass."""

    frames: int
    region: tuple[int, int, int]
    dtype: torch.dtype
    mode: str  # of MODES
    reason: str

    @property
    def stream(self) -> str:
        return {(1, 3, 3): "spatial", (5, 1, 1): "temporal", (5, 3, 3): "joint"}[self.region]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.stream} {self.frames} frames, {self.mode}, {self.dtype_name}"

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (1, self.frames, GRID, GRID, HEADS, HEAD_DIM)

    @property
    def query_shape(self) -> tuple[int, ...]:
        sizes = (self.frames, GRID, GRID)
        return (1, *(size // step for size, step in zip(sizes, self.region, strict=True)), HEADS, HEAD_DIM)

    @property
    def query_bytes(self) -> int:
        return math.prod(self.query_shape) * self.dtype.itemsize

    @property
    def key_bytes(self) -> int:
        return math.prod(self.key_shape) * self.dtype.itemsize

    def passes(self) -> list[tuple[list[int], list[int]]]:
        """Bytes of the tensors that each pass reads, and of those that it writes, as in `BYTES_COUNTED`."""
        q, k = self.query_bytes, self.key_bytes
        forward = ([q, k, k], [q])
        backward = ([q, k, k, q], [q, k, k])
        return [forward] if self.mode == "forward" else [forward, backward]

    @property
    def bytes_read(self) -> int:
        return sum(sum(read) for read, _ in self.passes())

    @property
    def bytes_written(self) -> int:
        return sum(sum(written) for _, written in self.passes())

    @property
    def flops(self) -> int:
        return {"forward": 4, "forward+backward": 14}[self.mode] * math.prod(self.key_shape)

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "kind": "attention",
            "stream": self.stream,
            "frames": self.frames,
            "region": list(self.region),
            "dtype": self.dtype_name,
            "mode": self.mode,
            "query_shape": list(self.query_shape),
            "key_shape": list(self.key_shape),
            "reason": self.reason,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bytes_counted": BYTES_COUNTED[self.mode],
            "flops": self.flops,
            "flops_counted": FLOPS_COUNTED[self.mode],
            "baseline": "eager, as published",
        }


_FRAME_REASONS = {
    8: "few frames: a short clip, as many video LLMs take",
    16: "the usual training length of small video models",
    40: "a medium clip; the other streams are compared at this length",
    100: "LLaVA-ST's own number of frames",
}
_STREAM_REASONS = {
    (5, 1, 1): "LLaVA-ST's temporal stream; on the raw 27x27 grid, so that it compares with the other streams "
    "(the model runs it on 9x9)",
    (5, 3, 3): "both streams in one step: regions of 45 tokens",
}


def select_cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of a run, those of the same tensors next to each other."""
    gpu = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
    cases = [
        Case(frames, (1, 3, 3), dtype, mode, reason)
        for dtype in dtypes
        for frames, reason in _FRAME_REASONS.items()
        if not quick or frames in (8, 40)
        for mode in MODES
    ]
    if quick:
        return cases
    cases += [
        Case(40, region, dtype, mode, reason)
        for dtype in dtypes
        for region, reason in _STREAM_REASONS.items()
        for mode in MODES
    ]
    if not gpu:
        cases += [Case(40, (1, 3, 3), torch.bfloat16, mode, "half the bytes, on a CPU") for mode in MODES]
    return cases
