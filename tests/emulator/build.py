"""Builds and imports `emulated_kernels`: the CUDA kernels, compiled for the CPU on top of the emulator."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_SOURCES = ("fibre.cpp", "emulator.cpp", "wrong_kernels.cpp", "emulated_attention.cpp")
_INCLUDES = (_ROOT / "csrc", _HERE, pybind11.get_include(), sysconfig.get_path("include"))
_FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with anything that goes into the module."""
    parts = [compiler, *flags, sysconfig.get_config_var("EXT_SUFFIX"), pybind11.__version__]
    headers = [*(_ROOT / "csrc" / "cuda").rglob("*.cuh"), *(_ROOT / "csrc" / "cuda").rglob("*.h")]
    headers += [*(_ROOT / "csrc" / "geometry").rglob("*.h"), *_HERE.glob("*.h"), *_HERE.glob("*.cpp")]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in sorted(headers):
        digest.update(path.relative_to(_ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def build(*extra_flags: str) -> Path:
    """Compiles the module, unless it is there already, and returns its path."""
    compiler = os.environ.get("CXX", "g++")
    flags = (*_FLAGS, *extra_flags)
    folder = _ROOT / "build" / "emulator" / _fingerprint(compiler, flags)
    module = folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}"  # several test runs may build at the same time

    def compile_source(source: str) -> str:
        to = str(folder / f"{source}.{unique}.o")
        _run(compiler, *flags, *(f"-I{path}" for path in _INCLUDES), "-c", str(_HERE / source), "-o", to)
        return to

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_source, _SOURCES))
    unfinished = f"{module}.{unique}"
    _run(compiler, "-shared", *flags, *objects, "-o", unfinished)
    os.replace(unfinished, module)
    for path in objects:
        os.remove(path)
    return module


@functools.cache
def load() -> ModuleType:
    """The module. LLAVA_ST_EMULATOR_SANITIZERS=1 builds it with sanitizers, whose runtime must be preloaded."""
    flags = SANITIZERS if os.environ.get("LLAVA_ST_EMULATOR_SANITIZERS") == "1" else ()
    spec = importlib.util.spec_from_file_location("emulated_kernels", build(*flags))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
