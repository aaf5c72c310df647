"""The AVX2 kernels keep to themselves: a processor without AVX2 can never get code that was compiled for it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O0", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{CSRC}")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="there are AVX2 kernels on x86-64 only")
@pytest.mark.parametrize("kernels", ["attention", "position"])
def test_no_function_is_shared_with_other_files(tmp_path, kernels):
    """The linker takes any copy of an inline function that several files define. Without optimisation all are there."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler) or not shutil.which("nm"):
        pytest.skip("no compiler or no nm (binutils)")
    made = tmp_path / "kernels.o"
    subprocess.run([compiler, *FLAGS, "-c", CSRC / "cpu" / f"{kernels}_avx2.cpp", "-o", made], check=True)
    symbols = subprocess.run(["nm", "--defined-only", made], capture_output=True, text=True, check=True).stdout
    functions = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] == "W"]
    assert functions, "there are inline functions at all"
    assert [name for name in functions if "4avx2" not in name] == []
