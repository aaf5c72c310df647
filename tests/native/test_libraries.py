"""The native libraries as files: what they lean on, and what happens where one is missing."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from llava_st_ops import library

# A library that keeps to the stable ABI leans on nothing else. The last row is what a CUDA program with a static
# runtime needs of libc, and the weak hooks that every shared object has.
ALLOWED = re.compile(
    r"""(aoti_torch_\w+ | torch_\w+                       # torch's stable C shims
      | \S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+             # libc, libm, libstdc++, libgcc
      | (_ITM_\w+|__gmon_start__|__cxa_finalize)
      )$""",
    re.VERBOSE,
)


def undefined_symbols(path):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    output = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in output.splitlines()]


@pytest.mark.parametrize("native", [library.CPU, library.CUDA], ids=["cpu", "cuda"])
def test_stable_symbols_only(native):
    if not native.path.exists():
        pytest.skip(native.reason)
    symbols = undefined_symbols(native.path)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "the library uses torch at all"
    assert [symbol for symbol in symbols if not ALLOWED.match(symbol)] == []


def test_symbol_rule_rejects_python_and_unstable_cpp():
    for symbol in ("PyInit_native", "_ZN2at4_ops5empty4callEv", "Py_IncRef", "cudaMalloc", "_ZN3c105ErrorD1Ev"):
        assert not ALLOWED.match(symbol)


@pytest.mark.parametrize("native", [library.CPU, library.CUDA], ids=["cpu", "cuda"])
def test_no_python_library_is_needed(native):
    if not native.path.exists() or shutil.which("readelf") is None:
        pytest.skip("no library or no readelf")
    dynamic = subprocess.run(["readelf", "-d", native.path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cudart" in name]
    assert not re.findall(r"R(?:UN)?PATH.*\[(.+?)\]", dynamic), "no path of the build machine"


def test_cpu_library_is_loaded():
    assert library.CPU.loaded, library.CPU.reason


def test_missing_library(tmp_path):
    native = library.load("cpu", folder=tmp_path)
    assert not native.loaded
    assert native.reason == "libllava_st_cpu.so was not built"
    (tmp_path / "CMakeLists.txt").touch()
    native = library.load("cpu", folder=tmp_path / "llava_st_ops" / "lib")
    assert "was not built in this checkout" in native.reason


def test_old_torch(tmp_path):
    (tmp_path / "libllava_st_cpu.so").touch()
    native = library.load("cpu", torch_text="2.9.1+cu128", folder=tmp_path)
    assert not native.loaded
    assert native.reason == "libllava_st_cpu.so needs torch >= 2.10, this is torch 2.9.1+cu128"


def test_broken_library(tmp_path):
    (tmp_path / "libllava_st_cpu.so").write_bytes(b"not a library")
    native = library.load("cpu", folder=tmp_path)
    assert not native.loaded
    assert "did not load" in native.reason


def test_version_text():
    assert library.torch_version("2.10.0a0+git123") == (2, 10)
    with pytest.raises(ValueError, match="version"):
        library.torch_version("unknown")


def test_schemas_are_those_of_the_ops():
    import torch

    for schema in library.read_schemas():
        name = schema.partition("(")[0]
        assert str(getattr(torch.ops.llava_st, name).default._schema) == f"llava_st::{schema}"
