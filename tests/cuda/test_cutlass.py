"""What the compiler makes of the products by CUTLASS: tensor cores fed past the registers, and nothing that spills.

Taken from the library where it was built with them, else compiled here, which takes minutes and CUTLASS's headers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_st_ops.library import LIBRARY_FOLDER
from scripts.kernel_report import ReportError, cuobjdump, demangle, find_tool, parse_resources

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "csrc" / "cuda" / "linear_lape_gelu" / "cutlass"
_LIBRARY = LIBRARY_FOLDER / "libllava_st_cuda.so"

# How the instructions begin that a kernel must have, by the end of its name: multiplication, what brings the factors,
# what brings the results away, and erf's exponential.
_PROMISED = {
    "linear_gelu_sm80": ["HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDSM", "STG.E.128", "LDG.E.128.CONSTANT", "MUFU.EX2"],
    "gelu_gradient_sm80": ["HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDSM", "STG.E.128", "LDG.E", "MUFU.EX2"],
    "linear_gelu_sm90": ["HGMMA.64x128x16.F32", "UTMALDG", "UTMASTG", "LDG.E.64.CONSTANT", "MUFU.EX2"],
    "gelu_gradient_sm90": ["HGMMA.64x128x16.F32", "UTMALDG", "UTMASTG", "MUFU.EX2"],
}
# Local memory, calls, and in wgmma's kernels single stores: TMA stores whole tiles.
_FORBIDDEN = {"sm80": ["LDL", "STL", "CALL"], "sm90": ["LDL", "STL", "CALL", "STG"]}


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    dtype: str
    stack: int
    instructions: Counter[str]

    def has(self, beginning: str) -> bool:
        return any(instruction.startswith(beginning) for instruction in self.instructions)


def read(library: Path, architecture: str) -> list[Kernel]:
    """Our kernels among those that a library has for an architecture."""
    resources = parse_resources(cuobjdump(library, "--dump-resource-usage"))
    instructions: dict[str, Counter[str]] = {}
    for line in cuobjdump(library, "--dump-sass", "--gpu-architecture", architecture):
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = instructions.setdefault(found[1], Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line):
            kernel[found[1]] += 1
    kernels = []
    for mangled, readable in zip(instructions, demangle(list(instructions)), strict=True):
        if found := re.search(r"<((?:linear_gelu|gelu_gradient)_sm\d+)<(\w+)", readable):
            used = resources[architecture, mangled]
            kernels.append(Kernel(found[1], architecture, found[2], used.stack, instructions[mangled]))
    return kernels


def headers() -> Path | None:
    package = importlib.util.find_spec("cutlass_library")
    folder = Path(package.origin).parent / "source" / "include" if package is not None and package.origin else None
    return folder if folder is not None and folder.is_dir() else None


def compile_here(folder: Path) -> list[Kernel]:
    """Both directions in bfloat16; float16 differs in a word."""
    nvcc, include = shutil.which("nvcc"), headers()
    if nvcc is None:
        pytest.skip("there is no nvcc, nor a library with products by CUTLASS")
    if include is None:
        pytest.skip("nvidia-cutlass is not installed, nor is there a library with products by CUTLASS")

    def compile_one(job: tuple[str, str, str]) -> list[Kernel]:
        direction, generation, target = job
        binary = folder / f"{direction}_{generation}.fatbin"
        source = _SOURCES / f"{direction}_{generation}_bfloat16.cu"
        options = ("-O3", "-DNDEBUG", "-std=c++17", "--expt-relaxed-constexpr", "-isystem", str(include))
        code = ("-gencode", f"arch=compute_{target},code=sm_{target}")
        subprocess.run([nvcc, "-fatbin", *options, *code, source, "-o", binary], check=True)
        return read(binary, f"sm_{target}")

    jobs = [
        (direction, *target) for target in (("sm90", "90a"), ("sm80", "80")) for direction in ("forward", "backward")
    ]
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(compile_one, jobs) for kernel in kernels]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[Kernel]:
    for name in ("cuobjdump", "nvdisasm", "c++filt"):
        try:
            find_tool(name)
        except ReportError as error:
            pytest.skip(str(error))
    found = []
    if _LIBRARY.exists():
        built = {key[0] for key in parse_resources(cuobjdump(_LIBRARY, "--dump-resource-usage")) if key[0]}
        found = [kernel for architecture in sorted(built) for kernel in read(_LIBRARY, architecture)]
    return found or compile_here(tmp_path_factory.mktemp("cutlass"))


def test_each_architecture_has_both_directions(kernels):
    generations = {kernel.name[-4:] for kernel in kernels}
    names = {kernel.name for kernel in kernels}
    assert names == {name for name in _PROMISED if name[-4:] in generations}
    for kernel in kernels:
        assert (kernel.architecture == "sm_90a") == kernel.name.endswith("sm90"), kernel


def test_instructions(kernels):
    for kernel in kernels:
        for beginning in _PROMISED[kernel.name]:
            assert kernel.has(beginning), (kernel.name, kernel.architecture, beginning, kernel.instructions)
        if kernel.dtype == "BFloat16":
            product = next(x for x in kernel.instructions if "MMA." in x)
            assert product.endswith(".BF16"), product


def test_no_spills_and_no_calls(kernels):
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        for beginning in _FORBIDDEN[kernel.name[-4:]]:
            assert not kernel.has(beginning), (kernel.name, kernel.architecture, beginning, kernel.instructions)


# What the host calculates ---------------------------------------------------------------------------------------------

_CHOICES = """
#include "choice.h"
#include <cstdio>
using namespace llava_st::cuda;
int main() {
  for (int major : {7, 8, 9, 10, 12, 13}) {
    for (long rows : {1L, 128L * 132, 128L * 131 + 1, 128L * 131, 1L << 31}) {
      std::printf("%d ", static_cast<int>(choose_fused({major, 132}, rows, 128)));
    }
  }
  std::printf("%d\\n", wants_cutlass());
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize(("sm80", "sm90"), [(True, True), (True, False), (False, True)])
def test_choices(tmp_path, monkeypatch, sm80, sm90):
    """By compute capability, where there are tiles enough for 132 multiprocessors and the kernel was built."""
    source, program = tmp_path / "choices.cu", tmp_path / "choices"
    source.write_text(_CHOICES)
    built = [f"-DLLAVA_ST_CUTLASS_{name}" for name, is_built in (("SM80", sm80), ("SM90", sm90)) if is_built]
    subprocess.run(["nvcc", "-std=c++17", *built, f"-I{_SOURCES}", source, "-o", program], check=True)
    expected = []
    for major in (7, 8, 9, 10, 12, 13):
        product = {8: 1 * sm80, 9: 2 * sm90, 12: 1 * sm80}.get(major, 0)
        expected += [0, product, product, 0, product]
    for setting, on in ((None, 0), ("", 0), ("0", 0), ("yes", 0), ("1", 1)):
        monkeypatch.delenv("LLAVA_ST_CUTLASS", raising=False)
        if setting is not None:
            monkeypatch.setenv("LLAVA_ST_CUTLASS", setting)
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        assert [int(number) for number in printed.split()] == [*expected, on]


_PLACES = """
#include "cuda/linear_lape_gelu/cutlass/positions.cuh"
#include <cstdio>
using namespace llava_st::cuda;
int main() {
  const int64_t channels = 8, limit = (int64_t{1} << 31) - 1;
  for (int64_t w : {int64_t{1}, int64_t{2}, int64_t{27}, int64_t{46341}, limit}) {
    for (int64_t h : {int64_t{1}, int64_t{3}, int64_t{27}, int64_t{65537}, limit}) {
      for (int64_t t : {int64_t{1}, int64_t{5}, int64_t{100}, limit}) {
        const Positions positions = {nullptr, nullptr, nullptr, nullptr, channels, Divisor(w), Divisor(h), Divisor(t)};
        const int64_t plane = w > limit / h ? limit : w * h, all = plane > limit / t ? limit : plane * t;
        for (int64_t base : {int64_t{0}, w, plane, all, limit}) {
          for (int64_t place = base - 3; place <= base + 3; ++place) {
            if (place < 0 || place > limit) continue;
            const PositionRows rows = positions.at(static_cast<int>(place));
            const auto row = [&](const float* data) { return reinterpret_cast<uintptr_t>(data) / 4 / channels; };
            if (row(rows.width) != uintptr_t(place % w) || row(rows.height) != uintptr_t(place / w % h) ||
                row(rows.temporal) != uintptr_t(place / w / h % t)) {
              std::printf("%ld in %ld x %ld x %ld\\n", long(place), long(t), long(h), long(w));
              return 1;
            }
          }
        }
      }
    }
  }
}
"""


def test_places_of_rows(tmp_path):
    """Frame, row and column of any row of a product, up to the last that 32 bits can number."""
    source, program = tmp_path / "places.cpp", tmp_path / "places"
    source.write_text(_PLACES)
    compiler = os.environ.get("CXX", "g++")
    folders = (f"-I{_SOURCES.parents[2]}", f"-I{_ROOT / 'tests' / 'emulator'}")
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-w",
        *folders,
        source,
        "-Wl,--unresolved-symbols=ignore-all",
        "-o",
        program,
    ]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize(
    ("definitions", "text"),
    [
        (
            ["LLAVA_ST_CUTLASS_SM80", "LLAVA_ST_CUTLASS_SM90"],
            "built for sm_80 and sm_90a, off by default (LLAVA_ST_CUTLASS=1 turns it on), never executed",
        ),
        (
            ["LLAVA_ST_CUTLASS_SM80"],
            "built for sm_80, off by default (LLAVA_ST_CUTLASS=1 turns it on), never executed",
        ),
        ([], "not built: nobody wants it"),
    ],
    ids=["all", "some", "none"],
)
def test_the_library_says_what_it_has(tmp_path, definitions, text):
    library = tmp_path / "library.so"
    texts = ('LLAVA_ST_CUTLASS_MISSING="nobody wants it"', 'LLAVA_ST_CUDA_ARCHITECTURES="80-real"')
    options = [f"-D{definition}" for definition in (*definitions, *texts)]
    source = _ROOT / "csrc" / "cuda" / "library.cu"
    subprocess.run(["nvcc", "-shared", "-Xcompiler", "-fPIC", *options, source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).llava_st_cutlass
    function.restype = ctypes.c_char_p
    assert function().decode() == text
