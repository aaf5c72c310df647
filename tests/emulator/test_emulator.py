"""The emulator catches faulty kernels, and lets their right twins pass."""

from __future__ import annotations

import math

import pytest

from tests.emulator.build import load

FAULTS = [
    "missing_barrier",
    "unwritten_shared_memory",
    "divergent_barrier",
    "skipped_barrier",
    "divergent_shuffle",
    "misaligned_load",
]
SEEDS = range(10)


def run(kernel: str, seed: int = 0) -> list[float]:
    return getattr(load(), kernel)(seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_right_twins_do_not_depend_on_the_seed(fault):
    results = [run(f"right_{fault}", seed) for seed in SEEDS]
    assert all(result == results[0] for result in results)
    assert not any(map(math.isnan, results[0]))


def test_missing_barrier_shows_as_dependence_on_the_seed():
    right = run("right_missing_barrier")
    assert right == [thread + (thread + 1) % 64 for thread in range(64)]
    results = [run("wrong_missing_barrier", seed) for seed in SEEDS]
    assert any(str(result) != str(results[0]) for result in results)
    assert all(any(map(math.isnan, result)) for result in results)  # neighbours that had not written yet


def test_unwritten_shared_memory_is_nan():
    result = run("wrong_unwritten_shared_memory")
    assert result[:32] == [1.0] * 32
    assert all(map(math.isnan, result[32:]))


@pytest.mark.parametrize(
    ("kernel", "pattern"),
    [
        ("divergent_barrier", r"threads 0-31 wait at a block barrier.*; threads 32-63 wait at a block barrier"),
        ("skipped_barrier", r"threads 0-47 wait at a block barrier in wrong_kernels.cpp:\d+; threads 48-63 exited"),
        ("divergent_shuffle", r"threads 0, 2, .*wait at a warp barrier.*; threads 1, 3, .*wait at shuffle_xor"),
        ("misaligned_load", r"thread \d+: a load of 16 bytes"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_faults_name_kernel_block_and_threads(kernel, pattern, seed):
    with pytest.raises(load().KernelError, match=pattern) as error:
        run(f"wrong_{kernel}", seed)
    assert f"{kernel}<false>" in str(error.value)
    assert "block 0" in str(error.value)
