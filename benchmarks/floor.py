"""The floor on a CPU: simple kernels of floor.cpp that move the bytes of a case and do nothing else.

The fastest of them is how fast this machine moves these bytes now. Compiled on first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .environment import cpu_model

SOURCE = Path(__file__).with_name("floor.cpp")
BUILD_FOLDER = Path(__file__).parents[1] / "build" / "benchmarks"
PATTERN = 0x3F803F803F803F80  # what the kernels write


class FloorError(RuntimeError):
    """The floor cannot be measured here, and why."""


@dataclass(frozen=True)
class Variant:
    """One way to move the bytes."""

    streaming: bool  # non-temporal stores, which do not read a line before they write it
    prefetch: bool  # software prefetch of the inputs
    huge_pages: bool  # outputs advised to lie on huge pages

    @property
    def name(self) -> str:
        parts = ["streaming stores" if self.streaming else "plain stores"]
        parts += ["prefetch"] * self.prefetch + ["huge pages"] * self.huge_pages
        return f"floor: {', '.join(parts)}"


VARIANTS = [Variant(*flags) for flags in itertools.product((False, True), repeat=3)]


class Outputs:
    """The memory that a pass wrote; freed with this object."""

    def __init__(self, library: ctypes.CDLL, addresses: list[int], sizes: Sequence[int], checksum: int) -> None:
        self._library = library
        self.addresses = addresses
        self.sizes = list(sizes)
        self.checksum = checksum

    def contents(self) -> list[bytes]:
        return [ctypes.string_at(address, size) for address, size in zip(self.addresses, self.sizes, strict=True)]

    def __del__(self) -> None:
        for address in self.addresses:
            self._library.floor_free(ctypes.c_void_p(address))


@functools.cache
def load_library() -> ctypes.CDLL:
    """Compiles floor.cpp for this CPU where that was not done before, and loads it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FloorError("no C++ compiler was found (g++, c++ or $CXX)")
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    # -march=native: a library built for one CPU may not run on another that shares the folder.
    identity = "\n".join([SOURCE.read_text(), *command, cpu_model(), platform.machine()])
    library = BUILD_FOLDER / f"floor-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.so"
    if not library.exists():
        BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, str(SOURCE), "-o", str(unfinished)], capture_output=True, text=True)
        if result.returncode != 0:
            raise FloorError(f"{compiler} could not compile {SOURCE.name}: {result.stderr.strip()[:300]}")
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


def move(inputs: Sequence[Tensor], output_bytes: Sequence[int], variant: Variant, threads: int) -> Outputs:
    """Reads all inputs (contiguous CPU tensors) and writes outputs of the given sizes into fresh memory."""
    library = load_library()
    sizes = [x.numel() * x.element_size() for x in inputs]
    for size in (*sizes, *output_bytes):
        if size % 64:
            raise ValueError(f"the floor moves multiples of 64 bytes, got {size}")
    addresses = (ctypes.c_void_p * len(output_bytes))()
    checksum = ctypes.c_uint64()
    failed = library.floor_pass(
        (ctypes.c_void_p * len(inputs))(*(x.data_ptr() for x in inputs)),
        (ctypes.c_size_t * len(sizes))(*sizes),
        len(inputs),
        addresses,
        (ctypes.c_size_t * len(output_bytes))(*output_bytes),
        len(output_bytes),
        int(variant.streaming),
        int(variant.prefetch),
        int(variant.huge_pages),
        threads,
        ctypes.c_uint64(PATTERN),
        ctypes.byref(checksum),
    )
    if failed:
        raise MemoryError(f"no memory for outputs of {sum(output_bytes)} bytes")
    return Outputs(library, list(addresses), output_bytes, checksum.value)
