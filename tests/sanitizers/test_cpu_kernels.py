"""The CPU kernels and the geometry headers run clean under sanitizers, and the sanitizers see what they do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.sanitizers.build import MissingRuntimeError, build, launcher

ADDRESS_AND_UNDEFINED = "address,undefined"
THREAD = "thread"
OPTIONS = ("ASAN_OPTIONS", "LSAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS", "LLAVA_ST_CPU_ISA", "LD_PRELOAD")


def run(sanitizer: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the driver; whoever runs the tests has no say in how."""
    try:
        command = [*launcher(sanitizer), build(sanitizer), *arguments]
    except MissingRuntimeError as error:
        pytest.skip(f"no runtime library for -fsanitize={sanitizer}: {error}")
    plain = {name: value for name, value in os.environ.items() if name not in OPTIONS}
    return subprocess.run(command, capture_output=True, text=True, env={**plain, **environment}, timeout=600)


def describe(result: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("sanitizer", [ADDRESS_AND_UNDEFINED, THREAD])
def test_kernels_and_geometry(sanitizer):
    result = run(sanitizer, TSAN_OPTIONS="halt_on_error=1")  # one race will do, as one error does for the others
    assert result.returncode == 0, describe(result)
    assert result.stdout.startswith("passed"), describe(result)
    assert not result.stderr, describe(result)
    if re.search(r"^flags\b.* avx2 ", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        assert result.stdout.endswith("on baseline avx2\n"), describe(result)


@pytest.mark.parametrize("instruction_set", ["best", "baseline"])
@pytest.mark.parametrize(
    ("sanitizer", "fault", "report"),
    [
        (ADDRESS_AND_UNDEFINED, "read", r"heap-buffer-overflow .*\bload\b"),
        (ADDRESS_AND_UNDEFINED, "write", r"heap-buffer-overflow .*\bstore\b"),
        (ADDRESS_AND_UNDEFINED, "stream", r"heap-buffer-overflow .*stream\b"),
        (ADDRESS_AND_UNDEFINED, "undefined", r"regions\.h:\d+:\d+: runtime error: signed integer overflow"),
        (THREAD, "race", r"data race .*\bstore\b"),
        (THREAD, "streamed race", r"data race .*stream\b"),
    ],
)
def test_faults_are_reported(sanitizer, fault, report, instruction_set):
    result = run(sanitizer, "--break", fault, LLAVA_ST_CPU_ISA=instruction_set)
    assert result.returncode != 0, describe(result)
    assert re.search(report, result.stderr), describe(result)


@pytest.mark.parametrize("instruction_set", ["best", "baseline"])
@pytest.mark.parametrize("sanitizer", [ADDRESS_AND_UNDEFINED, THREAD])
def test_the_same_without_a_fault_is_not_reported(sanitizer, instruction_set):
    result = run(sanitizer, "--break", "nothing", LLAVA_ST_CPU_ISA=instruction_set)
    assert result.returncode == 0, describe(result)
    assert "done, and no sanitizer minded" in result.stdout, describe(result)
    assert not result.stderr, describe(result)


@pytest.mark.parametrize("instruction_set", ["best", "baseline"])
@pytest.mark.parametrize("sanitizer", [ADDRESS_AND_UNDEFINED, THREAD])
def test_threads_that_find_no_memory(sanitizer, instruction_set):
    as_malloc_does = "allocator_may_return_null=1"
    options = {"ASAN_OPTIONS": as_malloc_does, "TSAN_OPTIONS": as_malloc_does}
    result = run(sanitizer, "--break", "memory", LLAVA_ST_CPU_ISA=instruction_set, **options)
    assert result.returncode == 0, describe(result)
    assert "no memory, and no sanitizer minded" in result.stdout, describe(result)
