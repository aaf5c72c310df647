"""Finds and loads the native libraries, and defines the ops where none could be loaded."""

from __future__ import annotations

import ast
import ctypes
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"
MINIMUM_TORCH = (2, 10)
NAMESPACE = "llava_st"
TRITON_NAMESPACE = "llava_st_triton"


@dataclass(frozen=True)
class NativeLibrary:
    """One of the two native libraries: loaded, or the reason why not."""

    path: Path
    loaded: bool
    reason: str

    def text(self, function: str) -> str:
        """What a `const char* function()` of the library returns."""
        symbol = getattr(ctypes.CDLL(str(self.path)), function)
        symbol.restype = ctypes.c_char_p
        return symbol().decode()

    def number(self, function: str) -> int:
        """What an `int function()` of the library returns."""
        return getattr(ctypes.CDLL(str(self.path)), function)()


def torch_version(version: str) -> tuple[int, int]:
    """Major and minor of a version text such as `2.13.0+cpu`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"version: expected a text like '2.13.0', got {version!r}")
    return int(match[1]), int(match[2])


def load(name: str, *, torch_text: str = torch.__version__, folder: Path = LIBRARY_FOLDER) -> NativeLibrary:
    """Loads `libllava_st_<name>.so`. Never raises: what went wrong is in the reason."""
    path = folder / f"libllava_st_{name}.so"
    if not path.exists():
        sources_alone = (folder.parent.parent / "CMakeLists.txt").exists() and not any(folder.glob("libllava_st_*.so"))
        hint = " in this checkout, which hides what is installed: start elsewhere, or install with --editable"
        return NativeLibrary(path, False, f"{path.name} was not built{hint if sources_alone else ''}")
    if torch_version(torch_text) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        return NativeLibrary(path, False, f"{path.name} needs torch >= {needed}, this is torch {torch_text}")
    if name == "cuda" and torch.version.cuda is None:
        return NativeLibrary(path, False, "this torch was built without CUDA")
    if damage := _damage(path, read_schemas()):
        return NativeLibrary(path, False, f"{path.name} {damage}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = " ".join(str(error.__cause__ or error).split())  # torch's own message leaves the loader's out
        return NativeLibrary(path, False, f"{path.name} did not load: {reason}")
    return NativeLibrary(path, True, f"{path.name} is loaded")


def _damage(path: Path, schemas: list[str]) -> str:
    """Why a file is not to be given to the loader, which ends the process on one that was cut off (SIGBUS), and cannot
    take back the ops of another version; empty where nothing is wrong. Both libraries have `schemas` in them."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        # ELF of 64 bits: the table of segments, and of each segment where it is in the file and how long.
        if content[:5] != b"\x7fELF\x02" or len(content) < 64:
            return "did not load: it is no library"
        (table,), (width, count) = struct.unpack_from("<Q", content, 32), struct.unpack_from("<HH", content, 54)
        ends = [table + width * count]
        if ends[0] <= len(content):
            segments = (table + width * number for number in range(count))
            ends += [sum(struct.unpack_from("<Q16xQ", content, segment + 8)) for segment in segments]
        if max(ends) > len(content):
            return f"did not load: it was cut off, {len(content)} bytes of {max(ends)} or more are there"
        if lacking := [schema for schema in schemas if content.find(schema.encode() + b"\0") < 0]:
            op = lacking[0].partition("(")[0]
            return f"was built for another version of the package, whose {op} differs: build it anew"
    return ""


def read_schemas() -> list[str]:
    """The op schemas, from the file that the native library is compiled with: in a checkout the source itself, since
    the copy beside a library is as old as the library."""
    candidates = (Path(__file__).parents[1] / "csrc" / "schemas.txt", LIBRARY_FOLDER / "schemas.txt")
    path = next(path for path in candidates if path.exists())
    return ast.literal_eval(f"[{path.read_text()}]")


def define_ops(namespace: str) -> torch.library.Library:
    """Defines every op of schemas.txt in a namespace of its own, without kernels."""
    library = torch.library.Library(namespace, "DEF")
    for schema in read_schemas():
        library.define(schema)
    return library


CPU = load("cpu")
CUDA = load("cuda") if CPU.loaded else NativeLibrary(CPU.path.with_name("libllava_st_cuda.so"), False, CPU.reason)

# Kernels written in Python are added to the ops through this; a native library has declared them already.
OPS = torch.library.Library(NAMESPACE, "FRAGMENT") if CPU.loaded else define_ops(NAMESPACE)

# Triton's kernels stand behind ops of the same names.
TRITON_OPS = define_ops(TRITON_NAMESPACE)
