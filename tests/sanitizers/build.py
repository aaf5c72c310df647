"""Builds the driver of the CPU kernels, cpu_kernels.cpp, under a sanitizer."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_CSRC = _ROOT / "csrc"
_BUILD = _ROOT / "build" / "sanitizers"
_COMPILER = os.environ.get("CXX", "g++")
# Lines and inlined functions for reports, but no variables, and calls for checks: that halves the time to compile.
_DEBUG = ("-O1", "-g1", "-fno-omit-frame-pointer", "--param=asan-instrumentation-with-call-threshold=0")
_FLAGS = ("-std=c++17", *_DEBUG, "-Wno-psabi", "-pthread", f"-I{_CSRC}")

_KERNEL_HEADERS = (*(_CSRC / "cpu").glob("*.h"), *(_CSRC / "geometry").glob("*.h"), _HERE / "seen_streams.h")
_HEADERS = (*_KERNEL_HEADERS, *_HERE.glob("*.h"))
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-include", str(_HERE / "seen_streams.h"))
_AVX2_FLAGS = _AVX2 if platform.machine() in ("x86_64", "AMD64") else ()
_KERNELS = {  # the slowest to compile come first
    _CSRC / "cpu" / "attention_baseline.cpp": (),
    _CSRC / "cpu" / "attention_avx2.cpp": _AVX2_FLAGS,
    _CSRC / "cpu" / "position_baseline.cpp": (),
    _CSRC / "cpu" / "position_avx2.cpp": _AVX2_FLAGS,
}
_DRIVER = tuple(
    _HERE / f"{name}.cpp" for name in ("cpu_kernels", "normalized", "geometry", "neighbors", "positions", "gelu")
)


class MissingRuntimeError(Exception):
    """The compiler has no runtime library for a sanitizer."""


def _flags(sanitizer: str) -> tuple[str, ...]:
    return (*_FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _make(name: str, arguments: Sequence[str], files: Sequence[Path]) -> Path:
    """Runs the compiler, unless it has made the same of the same files before, and returns what it made."""
    digest = hashlib.sha256("\n".join([_compiler_version(), _COMPILER, *arguments]).encode())
    for path in sorted(set(files)):
        digest.update(path.read_bytes())
    made = _BUILD / digest.hexdigest()[:16] / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_name(f"{name}.{os.getpid()}")  # several test runs may build at the same time
        command = [_COMPILER, *arguments, "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        os.replace(unfinished, made)
    return made


@functools.cache
def build(sanitizer: str) -> Path:
    """The driver and the kernels under `sanitizer`, a value of -fsanitize."""
    flags = _flags(sanitizer)

    def compile_source(source: Path) -> Path:
        headers = _KERNEL_HEADERS if source in _KERNELS else _HEADERS
        arguments = [*flags, *_KERNELS.get(source, ()), "-c", str(source)]
        return _make(f"{source.stem}.o", arguments, [source, *headers])

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_source, [*_KERNELS, *_DRIVER]))
    return _make("cpu_kernels", [*flags, *map(str, objects)], objects)


@functools.cache
def launcher(sanitizer: str) -> tuple[str, ...]:
    """What goes before a program under `sanitizer` on the command line.

    ThreadSanitizer cannot start where the kernel randomises addresses more than it knows of; `setarch -R` has it
    randomise nothing.
    """
    source = _BUILD / "empty.cpp"
    _BUILD.mkdir(parents=True, exist_ok=True)
    source.write_text("int main() {}\n")
    try:
        program = _make("empty", [*_flags(sanitizer), str(source)], [source])
    except RuntimeError as error:
        if "cannot find" in str(error):  # the linker, of a library
            raise MissingRuntimeError(str(error)) from None
        raise
    errors = []
    for prefix in ((), ("setarch", platform.machine(), "-R")):
        result = subprocess.run([*prefix, program], capture_output=True, text=True)
        if result.returncode == 0:
            return prefix
        errors.append(result.stderr)
    raise RuntimeError(f"an empty program under -fsanitize={sanitizer} fails:\n" + "\n".join(errors))
