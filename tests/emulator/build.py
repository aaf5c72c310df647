"""Builds and imports `emulated_kernels`: the CUDA library, compiled by the host's compiler on top of the emulator.

Every csrc/cuda/*/*.cu is part of it, so that a new kernel is emulated without further ado.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_TORCH = Path(torch.__file__).parent

_FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
# Device code tells the emulator of every access to memory and of undefined behaviour (instrumentation.cpp). That of
# virtual tables is left out: it needs the C++ runtime, and kernels have none.
_INSTRUMENTED = ("-O1", "-fsanitize=thread,undefined,bounds-strict,float-cast-overflow", "-fno-sanitize=vptr")
_UNINSTRUMENTED = ("-O2",)
# Instead, under AddressSanitizer: it cannot go along with the above, and knows the bounds of local arrays.
_ADDRESS = ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer")


def source_folder() -> Path:
    """Where the kernels come from. LLAVA_ST_EMULATED_SOURCES names another place, such as one with mutants."""
    return Path(os.environ.get("LLAVA_ST_EMULATED_SOURCES") or _ROOT / "csrc")


def under_address_sanitizer() -> bool:
    """Whether LLAVA_ST_EMULATOR asks for that build, whose runtime must be preloaded (test_address_sanitizer.py)."""
    return os.environ.get("LLAVA_ST_EMULATOR") == "address"


def _sources() -> dict[Path, tuple[str, ...]]:
    """Source files, and the flags of each."""
    device, host = (_ADDRESS, _ADDRESS) if under_address_sanitizer() else (_INSTRUMENTED, _UNINSTRUMENTED)
    kernels = sorted((source_folder() / "cuda").glob("*/*.cu"))
    emulator = sorted(path for path in _HERE.glob("*.cpp") if path.name != "bindings.cpp")
    return {
        _HERE / "bindings.cpp": device,
        **{path: ("-x", "c++", *device) for path in kernels},
        **{path: host for path in emulator},
    }


def _includes() -> list[str]:
    own = [f"-I{path}" for path in (source_folder(), _HERE)]
    others = (_TORCH / "include", pybind11.get_include(), sysconfig.get_path("include"))
    return [*own, *(f"-isystem{path}" for path in others)]


def _fingerprint(compiler: str) -> str:
    """Changes with anything that goes into the module."""
    flags = [flag for flags in _sources().values() for flag in flags]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [version, *_FLAGS, *_DEFINES, *flags, *_includes(), torch.__version__, pybind11.__version__]
    digest = hashlib.sha256("\n".join(parts).encode())
    folders = (source_folder(), _HERE)
    elsewhere = source_folder() / "cpu"  # no part of it
    paths = (path for folder in folders for path in folder.rglob("*") if elsewhere not in path.parents)
    for path in sorted(path for path in paths if path.suffix in _SUFFIXES):
        digest.update(path.as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_SUFFIXES = (".h", ".cuh", ".cu", ".cpp")


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several processes of a test run, one builds while the others wait for what it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """Compiles the module, unless it is there already, and returns its path."""
    compiler = os.environ.get("CXX", "g++")
    folder = _ROOT / "build" / "emulator" / _fingerprint(compiler)
    module = folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _alone(folder):
        if not module.exists():
            _compile(compiler, folder, module)
    return module


def _compile(compiler: str, folder: Path, module: Path) -> None:
    includes = _includes()

    def compile_source(item: tuple[Path, tuple[str, ...]]) -> str:
        source, flags = item
        to = str(folder / f"{source.parent.name}.{source.name}.o")
        _run(compiler, *_FLAGS, *_DEFINES, *flags, *includes, "-c", str(source), "-o", to)
        return to

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_source, _sources().items()))
    unfinished = f"{module}.unfinished"
    libraries = (f"-L{_TORCH / 'lib'}", f"-Wl,-rpath,{_TORCH / 'lib'}", "-ltorch_cpu", "-ldl")
    # Not the libraries of the other sanitizers: instrumentation.cpp stands in for them.
    wrapped = [f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset")]
    sanitizer = ("-fsanitize=address",) if under_address_sanitizer() else ()
    _run(compiler, "-shared", *sanitizer, *wrapped, *objects, *libraries, "-o", unfinished)
    os.replace(unfinished, module)
    for path in objects:
        os.remove(path)


@functools.cache
def _build_once() -> Path | str:
    """The module's path, or the compiler's errors, so that not every test asks for them anew."""
    try:
        return build()
    except RuntimeError as error:
        return str(error)


@functools.cache
def load() -> ModuleType:
    """The module. Importing it registers the emulated ops."""
    path = _build_once()
    if isinstance(path, str):
        raise RuntimeError(path)
    spec = importlib.util.spec_from_file_location("emulated_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
