"""Lays the package out as Hugging Face's `kernels` loads it, with the CPU library (docs/packaging.md).

    python scripts/hf_kernel.py OUT

compiles the library, and writes `OUT/build/torch-stable-abi210-cpu-<architecture>-linux`. Several versions of a kernel
may be in one process, so everything that registers ops under a name, `llava_st` and `llava_st_triton`, is renamed to
one that no other version has, in C++ by a definition and in Python by editing the copy.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_st_ops"
NATIVE = (ROOT / "csrc", ROOT / "cmake", ROOT / "CMakeLists.txt")
NAME = "llava-st-ops"
VERSION = 0  # below 1: the interface may still change
VARIANT = f"torch-stable-abi210-cpu-{platform.machine()}-linux"
NAMESPACES = re.compile(r"\bllava_st(?=_triton\b|\b)")


def sources() -> list[Path]:
    """The Python files of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py"))


def identifier() -> str:
    """The name that this version has as a module and as a namespace of ops: other sources, other name."""
    digest = hashlib.sha256()
    native = [file for path in NATIVE for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    for path in sorted([*sources(), *native]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"_llava_st_ops_cpu_{digest.hexdigest()[:10]}"


def compile_library(name: str, folder: Path) -> None:
    """The CPU library, its ops under `torch.ops.<name>`, into a folder."""
    with tempfile.TemporaryDirectory() as build:
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", build, "-DLLAVA_ST_CUDA=off"]
        configure += [f"-DLLAVA_ST_TORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_CXX_FLAGS=-Dllava_st={name}"]
        subprocess.run([*configure, f"-DCMAKE_INSTALL_PREFIX={folder.absolute()}"], check=True, stdout=sys.stderr)
        subprocess.run(["cmake", "--build", build], check=True, stdout=sys.stderr)
        subprocess.run(["cmake", "--install", build, "--strip"], check=True, stdout=sys.stderr)


def lay_out(out: Path, name: str) -> Path:
    """All but the library. Returns the folder of the variant, new and without what was there."""
    variant = out / "build" / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    for path in sources():
        copy = variant / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(NAMESPACES.sub(name, path.read_text()))
    library = variant / "lib"
    library.mkdir()
    shutil.copyfile(ROOT / "csrc" / "schemas.txt", library / "schemas.txt")
    shutil.copyfile(ROOT / "LICENSE", variant / "LICENSE")
    return variant


def write_metadata(variant: Path, name: str) -> None:
    """`metadata.json`, which `kernels` reads first, with a digest of every other file."""
    files = {
        str(path.relative_to(variant)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    name = identifier()
    variant = lay_out(out, name)
    compile_library(name, variant / "lib")
    write_metadata(variant, name)
    print(variant)


if __name__ == "__main__":
    main()
