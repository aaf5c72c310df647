"""The build on machines that lack something, and the wheel: its tag, its version, its contents."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGED = (
    "MANIFEST.in",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "csrc",
    "cmake",
    "llava_st_ops",
    "model",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests run away from the source")


def build_version(**environment):
    """What `setup.py --version` prints and says under an environment."""
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "LLAVA_ST_CUDA": "off", **environment},
        capture_output=True,
        text=True,
    )
    return result, (result.stdout.split() or [""])[-1], result.stderr


def test_local_version_names_the_libraries():
    _, version, _ = build_version()
    assert version.endswith("+cpu")


def test_without_a_compiler():
    _, version, said = build_version(CXX="no-such-compiler")
    assert "+" not in version
    assert "the C++ compiler no-such-compiler does not compile C++17, so no native libraries" in said


def test_with_a_compiler_that_does_not_fit():
    _, version, said = build_version(CXX="false")
    assert "+" not in version
    assert "does not compile C++17" in said


@pytest.mark.parametrize("missing", ["cmake", "ninja"])
def test_without_a_build_tool(tmp_path, missing):
    for tool in {"cmake", "ninja", "c++", "g++", "as", "ld", "cc1plus", "sh"} - {missing}:
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    # Tools beside the interpreter count, so it is called from a folder of its own, without its scripts.
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    program = f"import sys; sys.executable = {str(python)!r}; sys.argv = ['setup.py', '--version']; "
    program += "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "LLAVA_ST_CUDA": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{missing} was not found, so no native libraries" in result.stderr
    assert "+" not in result.stdout.split()[-1]


def test_with_an_old_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cpu'\n")
    _, version, said = build_version(PYTHONPATH=str(tmp_path))
    assert "+" not in version
    assert "native libraries need torch >= 2.10, this is torch 2.9.1+cpu" in said


def test_with_an_nvcc_that_does_not_work():
    broken = {"CUDACXX": shutil.which("false")}
    _, version, said = build_version(LLAVA_ST_CUDA="auto", **broken)
    assert version.endswith("+cpu")
    assert "no CUDA library: exit status 1" in said
    result, _, said = build_version(LLAVA_ST_CUDA="on", **broken)
    assert result.returncode != 0
    assert "LLAVA_ST_CUDA=on, but the CUDA library cannot be built" in said


def test_unknown_setting():
    result, _, said = build_version(LLAVA_ST_CUDA="maybe")
    assert result.returncode != 0
    assert "LLAVA_ST_CUDA must be auto, on or off, got 'maybe'" in said


def build_wheel(folder, **environment):
    """Builds a wheel from a copy of the source, so that the checkout stays as it is; later ones from the same copy."""
    source = folder / "source"
    if not source.exists():
        copy_source(source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, "."],
        cwd=source,
        env={**os.environ, "LLAVA_ST_CUDA": "off", **environment},
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def copy_source(source):
    ignore = shutil.ignore_patterns("lib", "__pycache__", "*.so")
    source.mkdir()
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name, **({"ignore": ignore} if (ROOT / name).is_dir() else {}))


def test_wheel_with_the_cpu_library(tmp_path):
    """Built twice: an isolated build leaves the path of a ninja behind that is gone by the next."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ninja").symlink_to(shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))
    build_wheel(tmp_path, PATH=f"{tools}:{os.environ['PATH']}")
    shutil.rmtree(tools)
    wheel, names = build_wheel(tmp_path)
    _, version, tag = wheel.stem.split("-", 2)
    assert version.endswith("+cpu")
    assert tag.startswith("py3-none-linux")
    assert {"llava_st_ops/lib/libllava_st_cpu.so", "llava_st_ops/lib/schemas.txt", "llava_st/video.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]


def test_wheel_of_python_alone_runs_where_it_is_installed(tmp_path):
    wheel, names = build_wheel(tmp_path, LLAVA_ST_NATIVE="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, llava_st_ops as ops; assert not ops.library.CPU.loaded; x = torch.ones(1, 1, 1, 1, 1, 2); "
        "print(ops.__file__, ops.point_to_region_attention(x, x, x, (1, 1, 1)).sum().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(site / "llava_st_ops" / "__init__.py"), "2.0"]


def test_source_distribution_builds(tmp_path):
    """What `python -m build` makes first has all that the wheel is built from."""
    source = tmp_path / "source"
    copy_source(source)
    sdist = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(sdist, cwd=source, env={**os.environ, "LLAVA_ST_CUDA": "off"}, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "built").mkdir()
    unpacked.rename(tmp_path / "built" / "source")
    _, names = build_wheel(tmp_path / "built")
    assert "llava_st_ops/lib/libllava_st_cpu.so" in names
