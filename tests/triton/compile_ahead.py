"""Compiles the kernels for a GPU that need not be there, and prints what came out as one line of JSON per kernel.

Run in a process of its own (`python -m tests.triton.compile_ahead`): it replaces Triton's driver. Kernels are compiled
for just what a call with such tensors launches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from llava_st_ops.triton import point_to_region_attention as launcher
from llava_st_ops.triton import propagation
from tests.attention_cases import Case

# The paper's shape has eight heads of 128: spatial, temporal and joint stream.
CASES = {
    "spatial": Case(1, (10, 27, 27), (1, 3, 3), 8, 128),
    "temporal": Case(1, (10, 27, 27), (5, 1, 1), 8, 128),
    "joint": Case(1, (10, 27, 27), (5, 3, 3), 8, 128),
    "many tiles": Case(1, (10, 27, 27), (10, 27, 27), 8, 128),
    "odd rows": Case(1, (10, 27, 27), (1, 3, 3), 8, 72),
    "one of everything": Case(1, (1, 1, 1), (1, 1, 1), 1, 1),
    "wide": Case(2, (3, 7, 5), (2, 3, 3), 3, 256),
}
DTYPES = {"spatial": (torch.bfloat16, torch.float16, torch.float32), "wide": (torch.float32,)}
PACKED = ("spatial", "many tiles", "one of everything")


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


def main(capability: int) -> None:
    triton.runtime.driver.set_active(_Driver(capability))
    name = dtype = form = None

    def compile_only(kernel, grid, *arguments, **options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        record = {"kernel": kernel.__name__, "case": name, "dtype": str(dtype), "form": form}
        record["loads"] = sorted(set(re.findall(r"ld\.global[.\w]*", compiled.asm["ptx"])))
        record["barriers"] = compiled.asm["ptx"].count("bar.sync")
        print(json.dumps(record | _resources(compiled.asm["cubin"])), flush=True)

    launcher._launch = propagation._launch = compile_only
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = "paper's tables"
        propagation.propagate_to_neighbors(torch.empty(100, 3584, dtype=dtype))
    for name, case in CASES.items():
        for dtype in DTYPES.get(name, (torch.bfloat16,)):
            query, key = (torch.empty(shape, dtype=dtype) for shape in (case.query_shape, case.key_shape))
            form = "dense"
            launcher.forward(query, key, key, case.region, None)
            launcher.backward(query, query, key, key, case.region, None)
            if name not in PACKED or dtype != torch.bfloat16:
                continue
            form = "packed"
            query, key, grid_thw = query.flatten(0, 3), key.flatten(0, 3), torch.tensor([case.grid] * case.batch)
            launcher.packed_forward(query, key, key, grid_thw, case.region, None)
            launcher.packed_backward(query, query, key, key, grid_thw, case.region, None)
    name, form, dtype = "64-bit counts", "dense", torch.bfloat16
    launcher._WIDE_FROM = 0
    launcher._MAX_PROGRAMS = 7
    case = CASES["spatial"]
    query, key = (torch.empty(shape, dtype=dtype) for shape in (case.query_shape, case.key_shape))
    launcher.backward(query, query, key, key, case.region, None)
    form, query, key = "packed", query.flatten(0, 3), key.flatten(0, 3)
    launcher.packed_backward(query, query, key, key, torch.tensor([case.grid]), case.region, None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
