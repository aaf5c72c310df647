"""A CUDA library of another version is not loaded: it says which ops it has, and is asked before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llava_st_ops import library

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "library.cu"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A CUDA library with nothing in it but what it says of itself."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    path = tmp_path_factory.mktemp("library") / "library.so"
    defined = ['-DLLAVA_ST_CUDA_ARCHITECTURES="80-real"', '-DLLAVA_ST_CUTLASS_MISSING="left out"']
    subprocess.run(["nvcc", "-shared", "-Xcompiler", "-fPIC", *defined, SOURCE, "-o", path], check=True)
    return path.read_bytes()


def load(folder: Path, content: bytes, monkeypatch) -> library.NativeLibrary:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (folder / library.CUDA.path.name).write_bytes(content)
    return library.load("cuda", folder=folder)


def test_the_same_version_is_loaded(tmp_path, content, monkeypatch):
    native = load(tmp_path, content, monkeypatch)
    assert native.loaded, native.reason
    assert native.number("llava_st_cuda_runtime_version") > 12000


@pytest.mark.parametrize("op", ["point_to_region_attention", "lape_scatter"])
def test_another_version_is_not(tmp_path, content, monkeypatch, op):
    schema = next(schema for schema in library.read_schemas() if schema.startswith(f"{op}("))
    assert content.count(schema.encode()) == 1
    other = content.replace(schema.encode(), schema.replace("Tensor", "Tenser").encode())
    native = load(tmp_path, other, monkeypatch)
    assert not native.loaded
    assert f"whose {op} differs: build it anew" in native.reason
