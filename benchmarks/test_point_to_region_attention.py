"""Point-to-region attention under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Small random shapes, for a quick look and for comparing two commits (`--benchmark-compare`). `python -m benchmarks` is
the measurement: a real clip, a cold cache, interleaved, with a floor.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import llava_st_ops

from . import peers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKENDS = [name for name, reason in peers.available_backends(DEVICE, DTYPE).items() if not reason]
PEERS: dict[str, Callable[..., Tensor]] = {
    "reference": llava_st_ops.reference.point_to_region_attention,
    "eager": peers.eager,
    "sdpa": peers.sdpa,
}
FRAMES = 10  # both (1, 3, 3) and (5, 1, 1) divide 10 x 27 x 27 tokens


def _inputs(region: tuple[int, int, int]) -> list[Tensor]:
    grid = (FRAMES, 27, 27)
    regions = [size // step for size, step in zip(grid, region, strict=True)]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, *sizes, 8, 128) for sizes in (regions, grid, grid)]
    return [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for shape in shapes]


def _run(implementation: str, inputs: list[Tensor], region: tuple[int, int, int]) -> Tensor:
    if implementation in PEERS:
        return PEERS[implementation](*inputs, region)
    with llava_st_ops.use_backend(implementation):
        return llava_st_ops.point_to_region_attention(*inputs, region)


def _synchronised(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.parametrize("region", [(1, 3, 3), (5, 1, 1)], ids=["spatial", "temporal"])
@pytest.mark.parametrize("implementation", [*BACKENDS, *PEERS])
def test_forward(benchmark, implementation, region):
    benchmark.group = f"forward, region {region}"
    inputs = _inputs(region)
    with torch.no_grad():
        benchmark.pedantic(_synchronised(lambda: _run(implementation, inputs, region)), rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("region", [(1, 3, 3), (5, 1, 1)], ids=["spatial", "temporal"])
@pytest.mark.parametrize("implementation", [*BACKENDS, *PEERS])
def test_forward_and_backward(benchmark, implementation, region):
    benchmark.group = f"forward+backward, region {region}"
    inputs = [x.requires_grad_() for x in _inputs(region)]
    grad_output = torch.randn_like(inputs[0])

    def call() -> object:
        return torch.autograd.grad(_run(implementation, inputs, region), inputs, grad_output)

    benchmark.pedantic(_synchronised(call), rounds=20, warmup_rounds=3)
