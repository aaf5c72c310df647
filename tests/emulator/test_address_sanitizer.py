"""The emulated kernels once more, under AddressSanitizer: it sees where a thread overruns an array of its own.

Its runtime must be there before anything else is, so these tests run in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with AddressSanitizer preloaded."""
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch there are plenty
        "LLAVA_ST_EMULATOR": "address",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=_ROOT, env=environment, capture_output=True, text=True)


def run_zoo(twin: str) -> subprocess.CompletedProcess[str]:
    code = "from tests.emulator.build import load; from tests.zoo_results import INPUT; "
    return run("-c", f"{code} print(load().{twin}['overrun_local_array'](INPUT.tolist()))")


def first_line(report: str) -> str:
    """The source lines of a report's first frame. The sanitizer's reader of debug information does not find them in
    so large a unit; addr2line does."""
    frame = re.search(r"#0 .*\((\S+)\+(0x[0-9a-f]+)\)", report)
    if frame is None:  # or libbacktrace did
        return next(line for line in report.splitlines() if "#0 " in line)
    command = ["addr2line", "--inlines", "--exe", frame[1], frame[2]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_overrun_is_caught():
    assert run_zoo("right").returncode == 0
    wrong = run_zoo("wrong")
    assert wrong.returncode != 0
    assert "stack-buffer-overflow" in wrong.stderr
    assert "zoo.cuh" in first_line(wrong.stderr)


@pytest.mark.parametrize(
    "kernels", ["attention", "normalized_attention", "lape_add", "lape_scatter", "linear_lape_gelu"]
)
def test_kernels(kernels):
    result = run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/emulator/test_emulated_{kernels}.py")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "passed" in result.stdout
