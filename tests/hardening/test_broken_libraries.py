"""A native library that is broken, cut off, or of another version: one line, and the right result."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llava_st_ops
from llava_st_ops import library

PROGRAM = """
import torch, llava_st_ops
x = torch.randn(1, 2, 3, 3, 2, 8)
query = torch.randn(1, 2, 1, 1, 2, 8)
for _ in range(2):
    found = llava_st_ops.point_to_region_attention(query, x, x, (1, 3, 3))
torch.testing.assert_close(found, llava_st_ops.reference.point_to_region_attention(query, x, x, (1, 3, 3)))
assert not llava_st_ops.library.CPU.loaded
print(llava_st_ops.library.CPU.reason)
"""


def other_version(content: bytes) -> bytes:
    """A library whose op has another argument."""
    schema = next(s for s in library.read_schemas() if s.startswith("point_to_region_attention("))
    assert content.count(schema.encode()) == 1
    return content.replace(schema.encode(), schema.replace("scale", "scald").encode())


BROKEN = {
    "empty": (lambda content: b"", "did not load: it is no library"),
    "text": (lambda content: b"not a library", "did not load: it is no library"),
    "header alone": (lambda content: content[:64], "did not load: it was cut off, 64 bytes of"),
    "half": (lambda content: content[: len(content) // 2], "did not load: it was cut off"),
    "nearly whole": (lambda content: content[: len(content) * 9 // 10], "did not load: it was cut off"),
    "another machine": (lambda content: content[:18] + b"\xb7\x00" + content[20:], "did not load"),
    "another version": (other_version, "whose point_to_region_attention differs: build it anew"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_is_not_loaded_and_says_why(tmp_path, name):
    change, reason = BROKEN[name]
    path = tmp_path / library.CPU.path.name
    path.write_bytes(change(library.CPU.path.read_bytes()))
    native = library.load("cpu", folder=tmp_path)
    assert not native.loaded
    assert reason in native.reason
    assert "\n" not in native.reason


@pytest.mark.parametrize("name", ["half", "another version"])
def test_the_reference_takes_over_with_one_line(tmp_path, name):
    """In a copy of the package: the loader of the system ends the process (SIGBUS) on a library that was cut off."""
    change, reason = BROKEN[name]
    package = tmp_path / "llava_st_ops"
    shutil.copytree(Path(llava_st_ops.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    (package / "lib" / "schemas.txt").write_text(",\n".join(f'"{schema}"' for schema in library.read_schemas()))
    (package / "lib" / library.CPU.path.name).write_bytes(change(library.CPU.path.read_bytes()))
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert reason in run.stdout
    lines = [line for line in run.stderr.splitlines() if "llava_st" in line and "Warning: " in line]
    assert len(lines) == 1, run.stderr
    assert "takes the PyTorch reference for float32 on cpu" in lines[0]
    assert reason in lines[0]
