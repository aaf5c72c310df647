"""Compiles the kernels for a GPU that need not be there, and prints what came out as one line of JSON per kernel.

Run in a process of its own (`python -m tests.triton.compile_ahead`): it replaces Triton's driver. Kernels are compiled
for just what a call with such tensors launches.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from llava_st_ops.triton import addition, coordinate_loss, lape_mlp, launching, propagation, scattering
from llava_st_ops.triton import point_to_region_attention as launcher
from tests.attention_cases import Case

# In the package, the function of that name is in front of the module.
normalized = importlib.import_module("llava_st_ops.triton.normalized_region_attention")

# The paper's shape has eight heads of 128: spatial, temporal and joint stream.
CASES = {
    "spatial": Case(1, (10, 27, 27), (1, 3, 3), 8, 128),
    "temporal": Case(1, (10, 27, 27), (5, 1, 1), 8, 128),
    "joint": Case(1, (10, 27, 27), (5, 3, 3), 8, 128),
    "many tiles": Case(1, (10, 27, 27), (10, 27, 27), 8, 128),
    "odd rows": Case(1, (10, 27, 27), (1, 3, 3), 8, 72),
    "one of everything": Case(1, (1, 1, 1), (1, 1, 1), 1, 1),
    "wide": Case(2, (3, 7, 5), (2, 3, 3), 3, 256),
    "widest": Case(1, (10, 24, 24), (1, 2, 2), 1, 1152),
    "biased": Case(1, (10, 27, 27), (1, 3, 3), 8, 128, biased=True),
    "biased, many tiles": Case(1, (10, 27, 27), (10, 27, 27), 8, 128, biased=True),
    "values of another width": Case(1, (10, 27, 27), (1, 3, 3), 8, 64, 128),
}
DTYPES = {"spatial": (torch.bfloat16, torch.float16, torch.float32), "wide": (torch.float32,)}
PACKED = ("spatial", "many tiles", "one of everything", "biased")


class Positions(NamedTuple):
    """Sizes of a problem of lape_add, lape_scatter and coordinate_cross_entropy."""

    grid: tuple[int, int, int]
    channels: int
    anchors: int
    vocabulary: int
    tokens: int


POSITIONS = {
    "paper": Positions((100, 27, 27), 3584, 100, 151660, 2700),
    "one of everything": Positions((1, 1, 1), 1, 1, 1, 1),
    "odd rows": Positions((7, 5, 3), 72, 9, 33, 5),
}


# Of the folded path: what a program does alone, and what several share.
SHARED = {
    "spatial": Case(1, (10, 27, 27), (1, 3, 3), 8, 1024),
    "joint": Case(1, (10, 27, 27), (5, 3, 3), 8, 1024),
    "most keys and heads": Case(1, (8, 8, 8), (4, 4, 4), 32, 1024),
    "many tiles": Case(1, (10, 27, 27), (10, 27, 27), 8, 1024),
    "odd rows": Case(1, (10, 27, 27), (1, 3, 3), 17, 72),
    "one of everything": Case(1, (1, 1, 1), (1, 1, 1), 1, 1),
}
SHARED_DTYPES = {
    "spatial": (torch.bfloat16, torch.float16, torch.float32),
    "many tiles": (torch.bfloat16, torch.float32),
}


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spilled registers) per thread, read by the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


# Tensors without memory: torch's own work between the kernels costs nothing.
_empty = partial(torch.empty, device="meta")


def _compile_additions(sizes: Positions, dtype: torch.dtype) -> None:
    video = _empty(1, *sizes.grid, sizes.channels, dtype=dtype)
    tables = [_empty(sizes.anchors, sizes.channels, dtype=dtype) for _ in range(3)]
    packed, grid_thw = video.flatten(0, 3), _empty(2, 3, dtype=torch.int64)
    for rounded in (False, True):
        addition.lape_add(video, *tables, False, rounded)
        addition.lape_add_packed(packed, *tables, grid_thw, True, rounded)
    addition.lape_add_backward(video, *tables)
    addition.lape_add_packed_backward(packed, *tables, grid_thw)


def _compile_tokens(sizes: Positions, dtype: torch.dtype) -> None:
    rows = (sizes.vocabulary, *(sizes.anchors,) * 3, sizes.tokens)
    *sources, visual = [_empty(count, sizes.channels, dtype=dtype) for count in rows]
    ids = _empty(sizes.tokens, dtype=torch.int64)
    axis, positions = ids.to(torch.int8), ids.double()
    scattering.lape_scatter(*sources, ids, axis, positions, ids, visual)
    scattering.lape_scatter_backward(visual, ids, ids, positions, *sources, visual)
    arguments = (visual, *sources, ids, axis, positions)
    losses, logsumexp = coordinate_loss.coordinate_cross_entropy(*arguments)
    coordinate_loss.coordinate_cross_entropy_backward(losses, logsumexp, *arguments, -100, True, True, True)


def _compile_shared(case: Case, dtype: torch.dtype) -> None:
    query, key = (_empty(shape, dtype=dtype) for shape in (case.query_shape, case.key_shape))
    key = key.select(4, 0).contiguous()
    normalized.normalized_region_attention(query, key, key, case.region)
    normalized.normalized_region_attention_backward(query, query, key, key, case.region)


def _compile_mlp(sizes: Positions, dtype: torch.dtype) -> None:
    features = _empty(1, *sizes.grid, 8, dtype=dtype)
    weight = _empty(2 * sizes.channels, 8, dtype=dtype)
    tables = [_empty(size, len(weight), dtype=dtype) for size in sizes.grid]
    lape_mlp.linear_lape_gelu(features, weight, weight[:, 0].contiguous(), *tables)
    _, preactivation = lape_mlp.linear_lape_gelu(features, weight, weight[:, 0].contiguous(), *tables, True)
    columns = preactivation.flatten(0, 3).chunk(2, 1)[1]
    lape_mlp.gelu_linear_gradient(_empty(len(columns), 8, dtype=dtype), _empty(8, sizes.channels, dtype=dtype), columns)


def main(capability: int) -> None:
    triton.runtime.driver.set_active(_Driver(capability))
    name = dtype = form = None

    seen = set()

    def compile_only(kernel, grid, *arguments, **options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if (compiled.hash, name, form) in seen:  # a loop launches a kernel many times
            return
        seen.add((compiled.hash, name, form))
        record = {"kernel": kernel.__name__, "case": name, "dtype": str(dtype), "form": form}
        record["loads"] = sorted(set(re.findall(r"ld\.global[.\w]*", compiled.asm["ptx"])))
        record["barriers"] = compiled.asm["ptx"].count("bar.sync")
        print(json.dumps(record | _resources(compiled.asm["cubin"])), flush=True)

    launching.launch = compile_only
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = "paper's tables"
        propagation.propagate_to_neighbors(torch.empty(100, 3584, dtype=dtype))
    for name, case in CASES.items():
        for dtype in DTYPES.get(name, (torch.bfloat16,)):
            shapes = (case.query_shape, case.key_shape, case.value_shape, case.output_shape)
            query, key, value, grad_output = (torch.empty(shape, dtype=dtype) for shape in shapes)
            bias = torch.empty(case.key_shape[:-1], dtype=dtype) if case.biased else None
            form = "dense"
            launcher.forward(query, key, value, case.region, None, bias)
            launcher.backward(grad_output, query, key, value, case.region, None, bias)
            if name not in PACKED or dtype != torch.bfloat16:
                continue
            form = "packed"
            query, key, value, grad_output = (x.flatten(0, 3) for x in (query, key, value, grad_output))
            bias = None if bias is None else bias.flatten(0, 3)
            grid_thw = torch.tensor([case.grid] * case.batch)
            launcher.packed_forward(query, key, value, grid_thw, case.region, None, bias)
            launcher.packed_backward(grad_output, query, key, value, grid_thw, case.region, None, bias)
    form = None
    for name, sizes in POSITIONS.items():
        for dtype in (torch.bfloat16, torch.float32) if name == "paper" else (torch.bfloat16,):
            _compile_additions(sizes, dtype)
            _compile_tokens(sizes, dtype)
            _compile_mlp(sizes, dtype)
    form = "shared"
    for name, case in SHARED.items():
        for dtype in SHARED_DTYPES.get(name, (torch.bfloat16,)):
            _compile_shared(case, dtype)
    form = None
    name, dtype = "64-bit counts", torch.bfloat16
    addition._WIDE_FROM = 0
    _compile_additions(POSITIONS["paper"], dtype)
    form = "dense"
    launcher._WIDE_FROM = 0
    launcher._MAX_PROGRAMS = 7
    normalized._WIDE_FROM = 0
    normalized._MAX_PROGRAMS = 7
    case = CASES["spatial"]
    query, key = (torch.empty(shape, dtype=dtype) for shape in (case.query_shape, case.key_shape))
    launcher.backward(query, query, key, key, case.region, None)
    form = "shared"
    for shared in ("spatial", "many tiles"):
        _compile_shared(SHARED[shared], dtype)
    form, query, key = "packed", query.flatten(0, 3), key.flatten(0, 3)
    launcher.packed_backward(query, query, key, key, torch.tensor([case.grid]), case.region, None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
