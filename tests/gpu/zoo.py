"""`python -m tests.gpu.zoo`: compiles zoo.cu, to be carried to a machine that has a GPU and no compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
LIBRARY = _ROOT / "build" / "gpu" / "libzoo.so"
ARCHITECTURES = ("80", "90a", "100", "120")


def build(library: Path = LIBRARY) -> Path:
    """Compiles the library for all architectures. Needs nvcc, not a GPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc")
    library.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    includes = (f"-I{_ROOT / 'csrc'}", f"-I{_ROOT / 'tests' / 'emulator'}")
    options = ("-std=c++17", "-shared", "-Xcompiler=-fPIC", "-diag-suppress=20014", *targets, *includes)
    subprocess.run([nvcc, *options, _ROOT / "tests" / "gpu" / "zoo.cu", "-o", library], check=True)
    return library


if __name__ == "__main__":
    print(build())
