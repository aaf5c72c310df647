"""The thin layer costs nothing: kernels written in raw intrinsics instead compile to no fewer instructions.

The raw kernels are a throw-away copy, in which every call of the layer is replaced by what CUDA offers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.kernel_report import read_kernels

_CSRC = Path(__file__).resolve().parents[2] / "csrc"
_MAIN = (_CSRC / "cuda" / "point_to_region_attention").glob("*.cuh")
_SHARED = [_CSRC / "cuda" / name for name in ("elements.cuh", "packed_grids.cuh")]

# What device code calls, and what it would say without the layer.
_RAW = {
    r"\bthread_index\(\)": "static_cast<int>(threadIdx.x)",
    r"\bblock_index\(\)": "static_cast<int64_t>(blockIdx.x)",
    r"\bblock_count\(\)": "static_cast<int64_t>(gridDim.x)",
    r"\bblock_barrier\(\)": "__syncthreads()",
    r"\bshuffle_xor\(": "__shfl_xor_sync(0xffffffffu, ",
    r"\bmaximum\(": "fmaxf(",
    r"(?<!:)\bexp2\(": "exp2f(",
    r"\bfloat_from_bits\(": "__uint_as_float(",
    r"\bbits_of\(": "__float_as_uint(",
    r"\bbfloat16_pair\(packet\.word\[i\]\)": (
        "FloatPair{__uint_as_float(packet.word[i] << 16), __uint_as_float(packet.word[i] & 0xffff0000u)}"
    ),
    r"\bbfloat16_word\(\{(.*?), (from.*?)\}\)": r"raw_bfloat16_word(\1, \2)",
    r"\bstore\((reinterpret_cast<typename L::Packet\*>)\(row": r"raw_store(\1(row",
    r"\bstore_streaming\((reinterpret_cast<typename L::Packet\*>)\(row": r"raw_store_streaming(\1(row",
    r"\bload_once\(": "raw_load(",
    r"\bfast_reciprocal\(": "raw_reciprocal(",
    r"\bsettled\((.*)\);": r'\1; asm("" : "+l"(first));',
}

# PTX that no intrinsic stands for, written out as a macro: nothing is called.
_MACROS = r"""
#define raw_reciprocal(x) ({ float r_; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r_) : "f"(x)); r_; })
#define raw_bfloat16_word(low, high) ({                                                                        \
  const __nv_bfloat162 r_ = __floats2bfloat162_rn(low, high);                                                  \
  __bfloat16_as_ushort(r_.x) | static_cast<uint32_t>(__bfloat16_as_ushort(r_.y)) << 16; })
#define raw_load(from, wanted) ({                                                                              \
  Words to_;                                                                                                   \
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"           \
               "mov.b32 %2, 0;\nmov.b32 %3, 0;\n"                                                              \
               "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"                      \
               : "=&r"(to_.word[0]), "=&r"(to_.word[1]), "=&r"(to_.word[2]), "=&r"(to_.word[3])                \
               : "l"(from), "r"(static_cast<int>(wanted)));                                                    \
  to_; })
#define raw_store(to, value) \
  __stwb(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]))
#define raw_store_streaming(to, value) \
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]))
"""

_KERNELS = """
#include "cuda/point_to_region_attention/{direction}.cuh"
namespace llava_st::cuda {{
template __global__ void attention_{direction}<Layout<BFloat16, 8, {lanes}, 1, {steps}, false>>(
    const {arguments}<BFloat16>);
}}
"""


def compile_kernel(folder: Path, csrc: Path, source: str) -> int:
    """The number of instructions of the one kernel in `source`."""
    folder.mkdir(exist_ok=True)
    file, binary = folder / "kernel.cu", folder / "kernel.fatbin"
    file.write_text(source)
    target = ("-gencode", "arch=compute_90a,code=sm_90a")
    subprocess.run(["nvcc", "-std=c++17", "-fatbin", *target, f"-I{csrc}", file, "-o", binary], check=True)
    (kernel,) = read_kernels(binary)
    return kernel.code.instructions


def write_raw_sources(folder: Path) -> Path:
    """A copy of csrc in which the attention kernels do without the layer."""
    csrc = folder / "csrc"
    shutil.copytree(_CSRC, csrc)
    replaced = set()
    for path in [csrc / path.relative_to(_CSRC) for path in (*_MAIN, *_SHARED)]:
        text = path.read_text()
        for pattern, raw in _RAW.items():
            text, count = re.subn(pattern, raw, text)
            if count:
                replaced.add(pattern)
        path.write_text(text)
    assert replaced == set(_RAW), f"device code no longer calls {set(_RAW) - replaced}"
    layer = csrc / "cuda" / "hardware.cuh"
    layer.write_text(layer.read_text() + _MACROS)
    return csrc


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_raw_intrinsics_make_no_fewer_instructions(tmp_path):
    raw = write_raw_sources(tmp_path)
    counts = {}
    for direction, arguments in (("forward", "ForwardArguments"), ("backward", "BackwardArguments")):
        for lanes, steps in ((8, 3), (16, 5)):
            source = _KERNELS.format(direction=direction, arguments=arguments, lanes=lanes, steps=steps)
            with_layer = compile_kernel(tmp_path / "layer", _CSRC, source)
            without = compile_kernel(tmp_path / "raw", raw, source)
            counts[f"{direction}, {lanes} lanes"] = (with_layer, without)
    print(counts)
    assert all(500 < with_layer <= without for with_layer, without in counts.values()), counts
