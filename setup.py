"""Drives the native build (CMakeLists.txt, with ninja) and names the wheel. Everything else is in pyproject.toml.

Environment:
    LLAVA_ST_CUDA        auto (default: where nvcc is found and works), on, off
    LLAVA_ST_CUDA_ARCHS  CUDA architectures in CMake's terms, such as "80-real;90a-real;80-virtual"
    LLAVA_ST_CUTLASS_DIR folder in whose include/ CUTLASS's headers are, or off (default: that of nvidia-cutlass, where
                         it is installed)
    LLAVA_ST_NATIVE      on (default), off: a package of Python alone
    MAX_JOBS             parallel compile jobs
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)


def notice(message: str) -> None:
    print(f"llava_st_ops: {message}", file=sys.stderr, flush=True)


@functools.cache
def torch_folder() -> Path | None:
    """Folder of a torch whose headers the native libraries can be built with."""
    try:
        import torch
    except ImportError:
        notice("no torch here, so no native libraries; install torch first and use --no-build-isolation")
        return None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MINIMUM_TORCH:
        notice(f"native libraries need torch >= 2.10, this is torch {torch.__version__}: building without them")
        return None
    return Path(torch.__file__).parent


def compiles(compiler: list[str], suffix: str, source: str) -> str | None:
    """None where `compiler` accepts `source`, else what it says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"probe{suffix}")
        file.write_text(source)
        try:
            run = subprocess.run([*compiler, "-c", file, "-o", file.with_suffix(".o")], capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return None if run.returncode == 0 else run.stderr.strip()[-800:] or f"exit status {run.returncode}"


def find_tool(name: str) -> str | None:
    """A build tool: on the path, or beside this Python, whose environment need not be activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


@functools.cache
def builds_native() -> bool:
    """Whether there is what the native libraries need; says what is missing."""
    if os.environ.get("LLAVA_ST_NATIVE", "on") == "off":
        notice("LLAVA_ST_NATIVE=off: a package of Python alone")
        return False
    if torch_folder() is None:
        return False
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    problem = compiles([*compiler.split(), "-std=gnu++17"], ".cpp", "#include <optional>\nstd::optional<int> probe;\n")
    if problem is not None:
        notice(f"the C++ compiler {compiler} does not compile C++17, so no native libraries: {problem}")
        return False
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            notice(f"{tool} was not found, so no native libraries; `pip install {tool}` provides it")
            return False
    return True


def find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((candidate for candidate in candidates if candidate and shutil.which(candidate)), None)


@functools.cache
def cuda_version() -> str | None:
    """Version of the nvcc that builds the CUDA library, such as `13.0`, or None where none is built."""
    wanted = os.environ.get("LLAVA_ST_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"LLAVA_ST_CUDA must be auto, on or off, got {wanted!r}")
    if wanted == "off" or not builds_native():
        return None
    nvcc = find_nvcc()
    problem = "nvcc was not found" if nvcc is None else compiles([nvcc], ".cu", "__global__ void probe() {}\n")
    if problem is None:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        return re.search(r"release (\d+\.\d+)", text)[1]
    if wanted == "on":
        raise SystemExit(f"llava_st_ops: LLAVA_ST_CUDA=on, but the CUDA library cannot be built: {problem}")
    notice(f"no CUDA library: {problem}")
    return None


@functools.cache
def cutlass_folder() -> str:
    """Folder in whose `include` CUTLASS's headers are, `off`, or nothing where there are none."""
    if folder := os.environ.get("LLAVA_ST_CUTLASS_DIR"):
        return folder
    package = importlib.util.find_spec("cutlass_library")
    source = Path(package.origin).parent / "source" if package is not None and package.origin else None
    if source is None or not (source / "include" / "cutlass").is_dir():
        notice("no products by CUTLASS, which are off by default; `pip install nvidia-cutlass` has its headers")
        return ""
    return str(source)


def cutlass_license() -> Path | None:
    """CUTLASS's license, which has to go along with what was compiled from its headers."""
    try:
        packaged = importlib.metadata.files("nvidia-cutlass") or []
    except importlib.metadata.PackageNotFoundError:
        packaged = []
    candidates = [Path(cutlass_folder()) / "LICENSE.txt"]  # of a checkout
    candidates += [Path(file.locate()) for file in packaged if file.name == "LICENSE.txt"]
    return next((path for path in candidates if path.is_file()), None)


def version() -> str:
    """Which native libraries a wheel holds is part of its version: `+cu130`, `+cpu`, or nothing."""
    public = runpy.run_path(str(ROOT / "llava_st_ops" / "version.py"))["__version__"]
    if not builds_native():
        return public
    cuda = cuda_version()
    return f"{public}+cu{cuda.replace('.', '')}" if cuda else f"{public}+cpu"


class CMakeBuild(build_ext):
    """Builds the native libraries into `llava_st_ops/lib`, in the source tree for an editable install."""

    def _folder(self) -> Path:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        return base / "llava_st_ops" / "lib"

    def run(self) -> None:
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "csrc" / "schemas.txt", folder / "schemas.txt")
        if builds_native():
            build = self._build(folder)
        for stale in folder.glob("*.so"):
            stale.unlink()
        if builds_native():
            subprocess.run([find_tool("cmake"), "--install", str(build), "--strip"], check=True)
        self._add_license(folder / "CUTLASS-LICENSE.txt")

    def _add_license(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if not cuda_version() or cutlass_folder() in ("", "off"):
            return
        if (license := cutlass_license()) is None:
            return notice("CUTLASS's license was not found; it has to go along with the CUDA library")
        shutil.copyfile(license, path)

    def _build(self, folder: Path) -> Path:
        build = Path(self.build_temp).absolute() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake"),
            "-G",
            "Ninja",
            f"-DLLAVA_ST_TORCH_DIR={torch_folder()}",
            f"-DLLAVA_ST_CUDA={'on' if cuda_version() else 'off'}",
            f"-DCMAKE_INSTALL_PREFIX={folder.absolute()}",
            # Named anew each time: the one in the cache may be that of an isolated build, and gone.
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-ULLAVA_ST_CUDA_ARCHS",  # nor is a choice of an earlier build one of this
        ]
        if cuda_version():
            configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            configure.append(f"-DLLAVA_ST_CUTLASS_DIR={cutlass_folder()}")
            if architectures := os.environ.get("LLAVA_ST_CUDA_ARCHS"):
                configure.append(f"-DLLAVA_ST_CUDA_ARCHS={architectures}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([*configure, "-S", str(ROOT), "-B", str(build)], check=True)
        subprocess.run([find_tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)
        return build

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._folder().glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class NativeWheel(bdist_wheel):
    """One wheel per platform for every Python: the libraries use torch's stable ABI and no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform if builds_native() else "any")


setup(
    version=version(),
    ext_modules=[Extension("llava_st_ops.lib.native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": NativeWheel},
)
