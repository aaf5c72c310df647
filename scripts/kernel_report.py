"""What the compiler made of each kernel of a CUDA library, on each architecture: registers, spills, widths of accesses.

    python scripts/kernel_report.py [LIBRARY] [--arch sm_90a] [--json FILE]

No GPU is needed, but cuobjdump and nvdisasm (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`) and c++filt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "llava_st_ops" / "lib" / "libllava_st_cuda.so"

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

LEGEND = """
shared: bytes per block; from sm_90 on with the kilobyte that the system adds to any.
stack, local: bytes per thread; spills: loads and stores of local memory.
loads, stores: of global memory, instructions x bits, without atomics and bulk copies; c: marked .CONSTANT.
generic: those of the loads and stores that may as well be of shared or local memory."""


class ReportError(RuntimeError):
    """Why there is no report."""


@dataclass(frozen=True)
class Resources:
    """Registers per thread and bytes of memory."""

    registers: int
    shared: int
    stack: int
    local: int


@dataclass
class Code:
    """How many instructions a kernel has, and how many of them access memory, by their width in bits."""

    instructions: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    constant_loads: dict[int, int] = field(default_factory=dict)  # not among `loads`
    stores: dict[int, int] = field(default_factory=dict)
    generic: int = 0  # of all these
    spills: int = 0

    def count(self, instruction: str) -> None:
        """Takes in one instruction, such as `LDG.E.128.CONSTANT`."""
        operation, *modifiers = instruction.split(".")
        if operation == "NOP":  # there is nothing but padding at the end of a kernel
            return
        self.instructions += 1
        self.generic += operation in ("LD", "ST")
        self.spills += operation in ("LDL", "STL")
        widths = {}
        if operation in ("LDG", "LD", "LDGSTS"):
            widths = self.constant_loads if "CONSTANT" in modifiers else self.loads
        elif operation in ("STG", "ST"):
            widths = self.stores
        bits = next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 32)
        widths[bits] = widths.get(bits, 0) + 1


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str
    resources: Resources
    code: Code

    def __str__(self) -> str:
        return f"{self.name} on {self.architecture}"


Key = tuple[str, str]  # an architecture and the mangled name of a kernel


def parse_resources(lines: Iterable[str]) -> dict[Key, Resources]:
    """Reads the output of `cuobjdump --dump-resource-usage`."""
    resources = {}
    architecture = kernel = ""
    for line in lines:
        if found := re.match(r"\s*arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            resources[architecture, kernel] = Resources(registers, shared, stack, local)
    return resources


def parse_sass(lines: Iterable[str]) -> dict[str, Code]:
    """Reads the output of `cuobjdump --dump-sass` for one architecture, by mangled names."""
    # An instruction begins with its address and perhaps a predicate, `@!P0`. Other comments are its encoding.
    interesting = re.compile(r"\s*(?:Function : (\S+)|/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*))")
    kernels = {}
    code = Code()
    for line in lines:
        if not (found := interesting.match(line)):
            continue
        if found[1]:
            code = kernels[found[1]] = Code()
        else:
            code.count(found[2])
    return kernels


def readable(name: str) -> str:
    """A demangled name without namespaces, and with words for the numbers of a layout (layout.cuh)."""
    name = re.sub(r"> (?=>)", ">", re.sub(r"\b(?:\w+::)+", "", name))
    name = re.sub(r"^\w+ (?=\w)", "", name)  # what it returns
    return re.sub(
        r"Layout<(\w+), (\d+), (\d+), (\d+), (\d+), (true|false)>",
        lambda found: "{}, {} elements, {} lanes, {} vectors, {} steps, {}".format(
            *found.groups()[:5], "many" if found[6] == "true" else "few"
        ),
        name,
    )


def find_tool(name: str) -> Path:
    """The one of the newest PyPI package that is installed, or one on the path."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    installed = sorted(packages.glob(f"*/bin/{name}"))
    found = installed[-1] if installed else shutil.which(name)
    if found is None:
        origin = "binutils" if name == "c++filt" else f"`pip install nvidia-cuda-{name}`"
        raise ReportError(f"there is no {name}: {origin} provides it")
    return Path(found)


def demangle(names: list[str]) -> list[str]:
    command = [find_tool("c++filt"), "--no-params"]
    run = subprocess.run(command, input="\n".join(names), check=True, capture_output=True, text=True)
    return [readable(name) for name in run.stdout.splitlines()]


def cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """The lines that cuobjdump prints."""
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")]  # the first looks for the second on the path
    path = os.pathsep.join([*(str(tool.parent) for tool in tools), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [tools[0], *options, library],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        yield from process.stdout
        error = process.stderr.read().strip()
    if process.returncode != 0:
        raise ReportError(f"cuobjdump fails with status {process.returncode} on {library}: {error}")


def read_kernels(library: Path, architecture: str | None = None) -> list[Kernel]:
    """The kernels of a library for all architectures, or for one."""
    if not library.is_file():
        raise ReportError(f"there is no {library}; `make cuda` builds the library")
    resources = parse_resources(cuobjdump(library, "--dump-resource-usage"))
    built = list(dict.fromkeys(key[0] for key in resources if key[0]))  # of a bare cubin cuobjdump does not tell it
    chosen = [name for name in built if architecture in (None, name)]
    if not chosen:
        raise ReportError(f"{library} has kernels for {built}, none for {architecture or 'any architecture'}")

    def disassemble(architecture: str) -> dict[Key, Code]:
        lines = cuobjdump(library, "--dump-sass", "--gpu-architecture", architecture)
        return {(architecture, name): code for name, code in parse_sass(lines).items()}

    codes: dict[Key, Code] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # cuobjdump takes seconds for each
        for part in pool.map(disassemble, chosen):
            codes.update(part)
    keys = [key for key in resources if key[0] in chosen]
    if odd := set(keys) ^ codes.keys():
        raise ReportError(f"cuobjdump lists resources or instructions, but not both, for {sorted(odd)}")
    names = demangle([name for _, name in keys])
    kernels = [Kernel(key[0], name, resources[key], codes[key]) for key, name in zip(keys, names, strict=True)]
    return sorted(kernels, key=lambda kernel: (chosen.index(kernel.architecture), kernel.name))


def counted(widths: dict[int, int], mark: str = "") -> list[str]:
    return [f"{count}x{bits}{mark}" for bits, count in sorted(widths.items())]


def table(kernels: list[Kernel]) -> str:
    rows = []
    for kernel in kernels:
        code = kernel.code
        rows.append(
            {
                "arch": kernel.architecture,
                "kernel": kernel.name,
                **asdict(kernel.resources),
                "spills": code.spills,
                "instructions": code.instructions,
                "loads": " ".join([*counted(code.loads), *counted(code.constant_loads, "c")]),
                "stores": " ".join(counted(code.stores)),
                "generic": code.generic,
            }
        )
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join([f"{{:{width}}}" for width in widths[:2]] + [f"{{:>{width}}}" for width in widths[2:]])
    return "\n".join(form.format(*line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY, help="or an object file; ours by default")
    parser.add_argument("--arch", help="one architecture, such as sm_90a")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    arguments = parser.parse_args()
    try:
        kernels = read_kernels(arguments.library, arguments.arch)
    except ReportError as error:
        raise SystemExit(f"kernel_report: {error}") from None
    print(table(kernels), LEGEND, sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=2) + "\n")


if __name__ == "__main__":
    main()
