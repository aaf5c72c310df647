"""No attention kernel spills: everything a kernel holds fits in registers, on every architecture it was built for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_st_ops.library import LIBRARY_FOLDER

LIBRARY = LIBRARY_FOLDER / "libllava_st_cuda.so"


@dataclass(frozen=True)
class Usage:
    """What the compiler says a kernel needs."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    local: int

    def __str__(self) -> str:
        return (
            f"{self.kernel} on {self.architecture}: {self.registers} registers, "
            f"{self.stack} bytes of stack, {self.local} bytes of local memory"
        )


def find_cuobjdump() -> str | None:
    """The one of the PyPI package nvidia-cuda-cuobjdump, or one on the path."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    installed = sorted(packages.glob("*/bin/cuobjdump")) if packages.is_dir() else []
    return str(installed[-1]) if installed else shutil.which("cuobjdump")


def parse_usage(text: str) -> Iterator[Usage]:
    """The kernels in the output of `cuobjdump --dump-resource-usage`."""
    architecture = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) .*\bLOCAL:(\d+)", line):
            yield Usage(architecture, kernel, int(found[1]), int(found[2]), int(found[3]))


def test_parse_usage():
    text = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _Z3fooPf:
  REG:32 STACK:8 SHARED:0 LOCAL:16 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert list(parse_usage(text)) == [Usage("sm_90a", "_Z3fooPf", 32, 8, 16)]


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: install nvidia-cuda-cuobjdump")
    command = [cuobjdump, "--dump-resource-usage", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [usage for usage in parse_usage(text) if "attention_" in usage.kernel]


def test_every_architecture_has_every_attention_kernel(usages):
    kernels = defaultdict(set)
    for usage in usages:
        kernels[usage.architecture].add(usage.kernel)
    assert kernels, "cuobjdump names no attention kernel"
    everything = set().union(*kernels.values())
    for direction in ("attention_forward", "attention_backward"):
        assert any(direction in kernel for kernel in everything)
    assert all(names == everything for names in kernels.values())


def test_no_attention_kernel_spills(usages):
    spilling = [usage for usage in usages if usage.stack > 0 or usage.local > 0]
    assert not spilling, "\n".join(map(str, spilling))
