"""The layout for Hugging Face's `kernels`. `scripts/check_package.sh --kernels` compiles one and loads it."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import sys

import pytest

from llava_st_ops import library
from scripts import hf_kernel

NAME = "_llava_st_ops_cpu_0123456789"


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    return hf_kernel.lay_out(tmp_path_factory.mktemp("kernel"), NAME)


def test_every_registration_is_renamed(variant):
    """Two versions in one process must not meet under a name."""
    text = (variant / "library.py").read_text()
    assert f'NAMESPACE = "{NAME}"' in text
    assert f'TRITON_NAMESPACE = "{NAME}_triton"' in text
    for path in variant.rglob("*.py"):
        assert not re.search(r"\bllava_st(_triton)?\b", path.read_text()), path
        ast.parse(path.read_text())


def test_it_imports_only_itself_torch_and_the_standard_library(variant):
    """A rule for kernels; Triton comes with torch. The module has another name there, so imports of it are relative."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= allowed, (path, names)


def test_metadata(variant):
    (variant / "lib" / library.CPU.path.name).write_bytes(library.CPU.path.read_bytes())
    hf_kernel.write_metadata(variant, NAME)
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"] == NAME
    assert metadata["id"].isidentifier()
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
    files = {str(path.relative_to(variant)) for path in variant.rglob("*") if path.is_file()}
    assert set(metadata["digest"]["files"]) == files - {"metadata.json"}
    digest = hashlib.sha256((variant / "__init__.py").read_bytes()).digest()
    assert metadata["digest"]["files"]["__init__.py"] == base64.b64encode(digest).decode()


def test_the_variant_names_the_oldest_torch():
    major, minor = library.MINIMUM_TORCH
    assert f"torch-stable-abi{major}{minor}-" in hf_kernel.VARIANT


def test_other_sources_have_another_name(monkeypatch):
    name = hf_kernel.identifier()
    assert re.fullmatch("_llava_st_ops_cpu_[0-9a-f]{10}", name)
    monkeypatch.setattr(hf_kernel, "NATIVE", hf_kernel.NATIVE[1:])
    assert hf_kernel.identifier() != name
