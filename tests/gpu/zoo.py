"""`python -m tests.gpu.zoo`: compiles zoo.cu, to be carried to a machine that has a GPU and no compiler."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_SOURCE = _ROOT / "tests" / "gpu" / "zoo.cu"
ARCHITECTURES = ("80", "90a", "100", "120")


def library_path() -> Path:
    """Where the library lies that is compiled from the sources as they are."""
    sources = [_SOURCE, _ROOT / "tests" / "emulator" / "zoo.cuh", *sorted((_ROOT / "csrc" / "cuda").glob("*.cuh"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return _ROOT / "build" / "gpu" / f"libzoo-{digest}.so"


def build(library: Path | None = None) -> Path:
    """Compiles the library for all architectures. Needs nvcc, not a GPU."""
    library = library or library_path()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc")
    library.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    includes = (f"-I{_ROOT / 'csrc'}", f"-I{_ROOT / 'tests' / 'emulator'}")
    options = ("-std=c++17", "-shared", "-Xcompiler=-fPIC", "-diag-suppress=20014", *targets, *includes)
    subprocess.run([nvcc, *options, _SOURCE, "-o", library], check=True)
    return library


if __name__ == "__main__":
    print(build())
