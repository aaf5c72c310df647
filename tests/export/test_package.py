"""Compiled packages (AOTInductor): the same tokens in another Python process and, by LibTorch alone, in C++."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from llava_st_ops import library
from llava_st_ops.export import export_program
from tests.export.modules import FRAMES, MAX_FRAMES, MODULES, clip, module_of, run_python, save_expected

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # what is not an op of ours the compiler fuses and rounds in its own way
# The wrapper, which calls the ops, is a large part of the compiler's time and a small one of the program's.
QUICKLY = {"aot_inductor.compile_wrapper_opt_level": "O0"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Of each module, for any number of frames."""
    folder = tmp_path_factory.mktemp("packages")
    for name in MODULES:
        module, width = module_of(name)
        program = export_program(module, clip(width, 10), max_frames=MAX_FRAMES)
        path = str(folder / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=QUICKLY)
    return folder


@pytest.fixture
def package(packages):
    return packages / "tokenizer.pt2"


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("tokenizer", ("lape_add", "linear_lape_gelu", "normalized_region_attention")),
        ("packer", ("point_to_region_attention",)),
    ],
)
def test_the_ops_are_called(packages, name, ops):
    with zipfile.ZipFile(packages / f"{name}.pt2") as archive:
        (proxies,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("wrapper.json"))
    for op in ops:
        assert f"llava_st::{op}" in proxies


@pytest.mark.parametrize("name", MODULES)
def test_in_another_process(packages, name, tmp_path):
    save_expected(name, tmp_path / "expected.pt")
    run_python(
        """
import sys, torch, llava_st_ops
run = torch._inductor.aoti_load_package(sys.argv[1])
for features, expected in zip(*torch.load(sys.argv[2]), strict=True):
    torch.testing.assert_close(tuple(run(features)), expected, rtol=1e-5, atol=1e-5)
""",
        packages / f"{name}.pt2",
        tmp_path / "expected.pt",
    )


@pytest.fixture(scope="module")
def tokenize_clip(tmp_path_factory):
    """The example, built as its users build it."""
    cmake = library_tool("cmake")
    build = tmp_path_factory.mktemp("build")
    configure = [cmake, "-S", EXAMPLE, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    for command in (configure, [cmake, "--build", build]):
        subprocess.run(command, check=True, capture_output=True)
    return build / "tokenize_clip"


def library_tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run_example(program, package, features, tokens):
    command = [program, library.CPU.path, package, features, tokens]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_in_cpp(tokenize_clip, package, tmp_path):
    module, width = module_of("tokenizer")
    for frames in FRAMES:
        features = clip(width, frames)
        torch.save(features, tmp_path / "features.pt")
        result = run_example(tokenize_clip, package, tmp_path / "features.pt", tmp_path / "tokens.pt")
        assert result.returncode == 0, result.stderr
        expected = module(features)
        assert result.stdout.splitlines() == [str(list(stream.shape)) for stream in expected]
        torch.testing.assert_close(torch.load(tmp_path / "tokens.pt"), expected, **TOLERANCE)


def test_cpp_errors(tokenize_clip, package, tmp_path):
    _, width = module_of("tokenizer")
    torch.save(clip(width + 1, 10), tmp_path / "wide.pt")
    torch.save(clip(width, MAX_FRAMES + 1), tmp_path / "long.pt")
    for name, said in (("wide", "input"), ("long", "input"), ("missing", "cannot read")):
        result = run_example(tokenize_clip, package, tmp_path / f"{name}.pt", tmp_path / "tokens.pt")
        assert result.returncode == 1
        assert said in result.stderr
    result = subprocess.run([tokenize_clip], capture_output=True, text=True)
    assert result.returncode == 2
    assert "usage" in result.stderr
