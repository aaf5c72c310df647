"""What kernels hold fits in registers, and rows move in vectors of sixteen bytes, on every architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from llava_st_ops.library import LIBRARY_FOLDER
from scripts.kernel_report import (
    Code,
    Kernel,
    ReportError,
    Resources,
    find_tool,
    parse_resources,
    parse_sass,
    read_kernels,
    readable,
    table,
)

LIBRARY = LIBRARY_FOLDER / "libllava_st_cuda.so"
VECTOR = 128  # bits
INTEGER = 64  # bits of the numbers that tell where packed videos begin
STATISTICS = 32  # those of a softmax's floats
MOST_SPILLED = 256  # bytes of each thread
NO_RESOURCES = Resources(registers=0, shared=0, stack=0, local=0)


@pytest.fixture(scope="module")
def tools() -> None:
    for name in ("cuobjdump", "nvdisasm", "c++filt"):
        try:
            find_tool(name)
        except ReportError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels(tools) -> list[Kernel]:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built")
    return read_kernels(LIBRARY)


def attention(kernels: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.name.startswith("attention_")]


def layout(kernel: Kernel) -> tuple[str, int, int, int]:
    """Of an attention kernel: the direction, elements of a vector, vectors of a row and steps of a chunk."""
    pattern = r"attention_(\w+)<\w+, (\d+) elements, \d+ lanes, (\d+) vectors, (\d+) steps, (?:few|many)>"
    found = re.fullmatch(pattern, re.sub(r"<Extended(<.*>)>", r"\1", kernel.name))
    assert found, f"{kernel.name} does not tell its layout: kernel_report.readable knows another one"
    return found[1], *map(int, found.groups()[1:])


def spills(kernel: Kernel) -> bool:
    return kernel.resources.stack > 0 or kernel.resources.local > 0 or kernel.code.spills > 0


def narrow_accesses(kernel: Kernel, integers: int) -> list[str]:
    """What an attention kernel reads and writes in less than vectors, but for so many loads of single integers."""
    direction, _, vectors, steps = layout(kernel)
    code = kernel.code
    complaints = [f"{n} loads of {bits} bits" for bits, n in code.loads.items() if bits < VECTOR and bits != INTEGER]
    complaints += [f"{n} constant loads of {bits} bits" for bits, n in code.constant_loads.items() if bits < VECTOR]
    complaints += [f"{n} stores of {bits} bits" for bits, n in code.stores.items() if bits < VECTOR]
    if (n := code.loads.get(INTEGER, 0)) > integers:
        complaints.append(f"{n} loads of {INTEGER} bits, not {integers}: is a row among them?")
    # A row that is read in pairs of integers, or not at all, is missing among the vectors.
    keys = 2 * steps  # with values
    rows_read, rows_written = {"forward": (1 + keys, 1), "backward": (2 + keys, 1 + keys)}[direction]
    for name, rows, widths in (
        ("loads", rows_read, (code.loads, code.constant_loads)),
        ("stores", rows_written, (code.stores,)),
    ):
        found = sum(n * (bits // VECTOR) for counts in widths for bits, n in counts.items())
        if found < rows * vectors:
            complaints.append(f"{found} {name} of vectors, where {rows} rows have {rows * vectors}")
    return complaints


def test_every_architecture_has_every_kernel(kernels):
    names = defaultdict(set)
    for kernel in kernels:
        if not kernel.name.startswith(("Kernel2<", "device_kernel<")):  # CUTLASS's: see test_cutlass.py
            names[kernel.architecture].add(kernel.name)
    everything = set().union(*names.values())
    assert {name.partition("<")[0] for name in everything} >= {"attention_forward", "attention_backward"}
    assert all(found == everything for found in names.values())


def test_only_the_widest_rows_spill(kernels):
    """Backward, rows of more than 256 channels, or of 256 with a bias over many keys, do not fit the registers."""
    spilling = list(filter(spills, kernels))
    wide = [kernel for kernel in spilling if kernel.name.startswith("attention_backward<Extended<")]
    unexpected = [kernel for kernel in spilling if kernel not in wide or kernel.resources.stack > MOST_SPILLED]
    assert not unexpected, "\n" + table(unexpected)


def test_every_dtype_has_vectors_of_sixteen_bytes_and_else_single_elements(kernels):
    elements = defaultdict(set)
    for kernel in attention(kernels):
        direction, count, *_ = layout(kernel)
        dtype = re.search(r"<(\w+),", kernel.name)[1]
        elements[kernel.architecture, direction, dtype].add(count)
    assert {dtype for *_, dtype in elements} == {"float", "Float16", "BFloat16"}
    for (*_, dtype), counts in elements.items():
        assert counts == {1, VECTOR // (32 if dtype == "float" else 16)}


def test_only_the_layout_of_single_elements_has_narrow_accesses(kernels):
    """But for kernels that may read a bias, which is a single number for each key."""
    without_bias = [kernel for kernel in attention(kernels) if "<Extended<" not in kernel.name]
    scalar = [kernel for kernel in without_bias if layout(kernel)[1] == 1]
    # Single elements have at most 32 bits, so that what has 64 there is no part of a row.
    integers = defaultdict(int)
    for kernel in scalar:
        integers[kernel.architecture] = max(integers[kernel.architecture], kernel.code.loads.get(INTEGER, 0))
    complaints = {str(kernel): narrow_accesses(kernel, integers[kernel.architecture]) for kernel in without_bias}
    for kernel in scalar:  # real code shows that the check sees narrow accesses
        assert complaints.pop(str(kernel)), f"{kernel} has none"
    assert complaints, "there is no kernel of vectors"
    narrow = [f"{name}: {'; '.join(found)}" for name, found in complaints.items() if found]
    assert not narrow, "\n".join(narrow)


# What kernels of rows in packets move at once, in bits; 64 are also numbers that tell where packed videos begin.
# lape_scatter reads and writes rows of tables whatever their dtype and alignment, and is looked at below.
ROW_KERNELS = {
    "lape_add_forward": {VECTOR, INTEGER},
    "lape_add_keep_rest": {VECTOR, INTEGER},
    "lape_add_sum_tiles": {VECTOR, VECTOR // 2},  # gradients in half vectors, sums in float
    "lape_add_sum_slices": {VECTOR, VECTOR // 2},
    "lape_add_finish": {VECTOR, VECTOR // 2},
    "lape_scatter_sum_segments": {VECTOR, INTEGER},
    "position_gelu": {VECTOR},
    "gelu_gradient": {VECTOR},
    "normalized_forward": {VECTOR},
    "normalized_query_gradient": {VECTOR, STATISTICS},
    "normalized_token_gradients": {VECTOR, STATISTICS},
}


def row_packets(kernel: Kernel) -> tuple[str, int] | None:
    """Of a kernel that moves rows in packets: its name, and how many elements make a packet."""
    found = re.fullmatch(r"(\w+)<Packets<\w+, (\d+)>.*>", kernel.name)
    return (found[1], int(found[2])) if found else None


def widths(code: Code) -> set[int]:
    return {*code.loads, *code.constant_loads, *code.stores}


def test_rows_move_in_packets_or_single_elements(kernels):
    layouts, narrow = defaultdict(set), []
    for kernel in kernels:
        if (found := row_packets(kernel)) is None:
            continue
        name, count = found
        layouts[kernel.architecture, name].add(count > 1)
        if name in ROW_KERNELS and count > 1 and (odd := widths(kernel.code) - ROW_KERNELS[name]):
            narrow.append(f"{kernel} moves {sorted(odd)} bits at once")
        if name in ROW_KERNELS and count == 1:
            assert widths(kernel.code) & {16, 32}, f"{kernel} shows no narrow access, so that the check sees none"
    assert {name for _, name in layouts} >= {*ROW_KERNELS, "lape_scatter_forward", "lape_scatter_gather"}
    assert all(both == {True, False} for both in layouts.values()), layouts
    assert not narrow, "\n".join(narrow)


def test_tensor_cores_are_fed_in_vectors(kernels):
    tiles = [kernel for kernel in kernels if kernel.name.startswith("normalized_tile_")]
    assert {kernel.name.partition("<")[0] for kernel in tiles} == {
        "normalized_tile_forward",
        "normalized_tile_backward",
    }
    for kernel in tiles:
        assert widths(kernel.code) == {VECTOR}, str(kernel)
        # Two blocks of eight warps, which take the 1024 channels of the paper, share a multiprocessor's registers.
        assert kernel.resources.registers <= 128, str(kernel)


def test_rows_of_embeddings_are_copied_in_vectors(kernels):
    """Four loads are under way at once, and there are as many stores."""
    for kernel in kernels:
        if row_packets(kernel) is None or not kernel.name.startswith("lape_scatter_") or row_packets(kernel)[1] == 1:
            continue
        code = kernel.code
        assert code.constant_loads[VECTOR] >= 4, str(kernel)
        if "forward" in kernel.name:
            assert code.stores.keys() == {VECTOR}, str(kernel)
            assert code.stores[VECTOR] >= 4, str(kernel)


def test_parse_resources():
    text = """
Fatbin ptx code:
================
arch = sm_80

Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _Z3fooPf:
  REG:32 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    expected = Resources(registers=32, shared=1024, stack=8, local=16)
    assert parse_resources(text.splitlines()) == {("sm_90a", "_Z3fooPf"): expected}


def sass(*instructions: str) -> list[str]:
    """What cuobjdump prints for a kernel of these."""
    text = ["\tcode for sm_80", "\t\tFunction : _Z3fooPf", '\t.headerflags\t@"EF_CUDA_SM80"']
    for number, instruction in enumerate(instructions):
        text.append(f"        /*{16 * number:04x}*/              {instruction} ;   /* 0x0000000404047981 */")
        text.append("                                                           /* 0x000fe2000c1e1900 */")
    return [*text, "\t\t.........."]


def test_parse_sass():
    lines = sass(
        "LDC R1, c[0x0][0x37c]",
        "LDG.E R4, [R4.64]",
        "@P0 LDG.E.NA.128.CONSTANT R8, [R2.64]",
        "@!P1 LDG.E.U8 R3, desc[UR4][R2.64+0x8]",
        "LDG.E.S16.CONSTANT R3, [R2.64]",
        "LDG.E.LTC128B.64 R6, [R2.64]",
        "@!UPT LDG.E.ENL2.256 R12, R8, desc[UR4][R2.64]",
        "LDGSTS.E.BYPASS.128 [R9], [R2.64]",
        "LDGDEPBAR",
        "LD.E R2, [R4.64+0x4]",
        "LDS.128 R4, [R9]",
        "LDL.64 R4, [R1]",
        "@P0 STL [R1+0x4], R4",
        "STG.E.EF.128 [R2.64], R4",
        "@P3 ST.E.U16 [R2.64], R4",
        "SHFL.BFLY PT, R12, R114, 0x8, 0x1f",
        "BRA 0x5f40",
        "NOP",
    )
    code = parse_sass(lines)["_Z3fooPf"]
    assert code == Code(
        instructions=17,
        loads={32: 2, 8: 1, 64: 1, 256: 1, 128: 1},
        constant_loads={128: 1, 16: 1},
        stores={128: 1, 16: 1},
        generic=2,
        spills=2,
    )


def test_readable():
    name = "llava_st::cuda::attention_forward<llava_st::cuda::Layout<llava_st::cuda::BFloat16, 8, 16, 1, 5, {}> >"
    plain = "attention_forward<BFloat16, 8 elements, 16 lanes, 1 vectors, 5 steps, {}>"
    assert readable(name.format("false")) == plain.format("few")
    assert readable("void " + name.format("true")) == plain.format("many")
    layout_name = name.format("true").removeprefix("llava_st::cuda::attention_forward<").removesuffix(" >")
    extended = f"llava_st::cuda::attention_forward<llava_st::cuda::Extended<{layout_name} > >"
    assert readable(extended) == plain.format("many").replace("<", "<Extended<").replace(">", ">>")
    assert readable("llava_st::cuda::locate_videos<int>") == "locate_videos<int>"


@pytest.mark.parametrize(
    ("instructions", "complaint"),
    [
        (["LDG.E.64"] * 2 + ["LDG.E.NA.128.CONSTANT"] * 3 + ["STG.E.128"], None),
        (["LDG.E.ENL2.256.CONSTANT"] * 2 + ["STG.E.ENL2.256"], None),
        (["LDGSTS.E.BYPASS.128"] * 3 + ["STG.E.EF.128"], None),
        (["LDG.E.128"] * 3 + ["LDG.E.U16"] + ["STG.E.128"], "1 loads of 16 bits"),
        (["LDG.E.128"] * 3 + ["LDG.E.CONSTANT"] * 4 + ["STG.E.128"], "4 constant loads of 32 bits"),
        (["LDG.E.128"] * 3 + ["LDG.E.64.CONSTANT"] * 2 + ["STG.E.128"], "2 constant loads of 64 bits"),
        (["LDG.E.128"] * 3 + ["LDG.E.64"] * 4 + ["STG.E.128"], "4 loads of 64 bits"),
        (["LDG.E.128"] * 2 + ["LDG.E.64"] * 2 + ["STG.E.128"], "2 loads of vectors"),
        (["LDG.E.128"] * 3 + ["STG.E.64"] * 2, "2 stores of 64 bits"),
        (["LDG.E.128"] * 3, "0 stores of vectors"),
    ],
)
def test_narrow_accesses_of_a_row_of_query_key_and_value(instructions, complaint):
    name = "attention_forward<BFloat16, 8 elements, 32 lanes, 1 vectors, 1 steps, few>"
    code = parse_sass(sass(*(f"@P0 {instruction} R4, [R2.64]" for instruction in instructions)))["_Z3fooPf"]
    complaints = "; ".join(narrow_accesses(Kernel("sm_80", name, NO_RESOURCES, code), integers=2))
    assert complaint in complaints if complaint else not complaints


# Kernels with one query, key and value per lane: each adds them up, read in pieces of one type, and writes the sum in
# pieces of another. `Array` does so by way of an array that cannot be in registers.
KERNELS = """
struct AllVectors { using Load = uint4; using Store = uint4; };
struct Halves { using Load = uint2; using Store = uint4; };
struct Words { using Load = unsigned; using Store = uint4; };
struct StoredHalves { using Load = uint4; using Store = uint2; };
struct Array { using Load = uint4; using Store = uint4; };

template <class T, int ELEMENTS, int LANES, int VECTORS, int STEPS, bool MANY> struct Layout { using Element = T; };

__device__ unsigned sum(unsigned x) { return x; }
__device__ unsigned sum(uint2 x) { return x.x + x.y; }
__device__ unsigned sum(uint4 x) { return x.x + x.y + x.z + x.w; }
__device__ void fill(uint2& to, unsigned x) { to = make_uint2(x, x); }
__device__ void fill(uint4& to, unsigned x) { to = make_uint4(x, x, x, x); }

template <class L, class Load, class Store>
__device__ void add(const Load* from, Store* to) {
  unsigned result = 0;
  #pragma unroll
  for (int i = 0; i < 48 / sizeof(Load); ++i) result += sum(from[48 / sizeof(Load) * threadIdx.x + i]);
  #pragma unroll
  for (int i = 0; i < 16 / sizeof(Store); ++i) fill(to[16 / sizeof(Store) * threadIdx.x + i], result);
}

template <class L>
__global__ void attention_forward(const typename L::Element::Load* from, typename L::Element::Store* to) {
  add<L>(from, to);
}

template <>
__global__ void attention_forward<Layout<Array, 8, 32, 1, 1, false>>(const uint4* from, uint4* to) {
  add<Layout<Array, 8, 32, 1, 1, false>>(from, to);
  unsigned array[64];
  for (int i = 0; i < 64; ++i) array[i] = to[i].x;
  for (int i = 0; i < 64; ++i) array[array[i] % 64] += i;
  for (int i = 0; i < 64; ++i) fill(to[i], array[i]);
}

template __global__ void attention_forward<Layout<AllVectors, 8, 32, 1, 1, false>>(const uint4*, uint4*);
template __global__ void attention_forward<Layout<Halves, 8, 32, 1, 1, false>>(const uint2*, uint4*);
template __global__ void attention_forward<Layout<Words, 8, 32, 1, 1, false>>(const unsigned*, uint4*);
template __global__ void attention_forward<Layout<StoredHalves, 8, 32, 1, 1, false>>(const uint4*, uint2*);
"""


def test_wrong_kernels_show(tools, tmp_path: Path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source, binary = tmp_path / "kernels.cu", tmp_path / "kernels.fatbin"
    source.write_text(KERNELS)
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a")]
    subprocess.run([nvcc, "-std=c++17", "-fatbin", *architectures, source, "-o", binary], check=True)
    kernels = read_kernels(binary)
    assert {kernel.architecture for kernel in kernels} == {"sm_80", "sm_90a"}
    assert [kernel.architecture for kernel in read_kernels(binary, "sm_90a")] == ["sm_90a"] * 5
    for kernel in kernels:
        which = re.search(r"<(\w+)", kernel.name)[1]
        assert spills(kernel) == (which == "Array"), str(kernel)
        complaints = narrow_accesses(kernel, integers=2)
        if which == "Halves":
            assert complaints[0].startswith("6 loads of 64 bits"), str(kernel)
        elif which == "Words":
            assert complaints[0] == "12 loads of 32 bits", str(kernel)
        elif which == "StoredHalves":
            assert complaints[0] == "2 stores of 64 bits", str(kernel)
        elif which == "AllVectors":
            assert not complaints, str(kernel)


def test_what_is_no_library_is_said(tools, tmp_path: Path):
    with pytest.raises(ReportError, match=r"there is no .*absent\.so; `make cuda` builds"):
        read_kernels(tmp_path / "absent.so")
    text = tmp_path / "text.so"
    text.write_text("text")
    with pytest.raises(ReportError, match=r"cuobjdump fails .*text\.so"):
        read_kernels(text)


def test_a_missing_tool_is_named():
    with pytest.raises(ReportError, match="there is no absent: `pip install nvidia-cuda-absent` provides it"):
        find_tool("absent")
