"""Turns, rounds, percentiles and peak memory. No duration is asserted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import CpuTimer, Rounds, interleave, summarise
from benchmarks.memory import peak_memory


def test_implementations_take_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rounds: list[int] = []
    samples = interleave(calls, CpuTimer(settle_s=0), Rounds(3, 3, 0), rounds.append)
    assert order == list("abcbcacab"), "each round begins with another"
    assert rounds == [0, 1, 2]
    assert all(len(found) == 3 and min(found) >= 0 for found in samples.values())


def test_a_result_is_freed_before_the_next_call():
    alive: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.append(1)
            assert len(alive) == 1

        def __del__(self) -> None:
            alive.pop()

    interleave({"a": Result, "b": Result}, CpuTimer(settle_s=0), Rounds(2, 2, 0))


def test_rounds_end_with_the_budget_but_not_before_the_fewest(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    class Timer:
        def sample(self, call) -> float:
            return 0.0

    def rounds(*arguments) -> int:
        return len(interleave({"a": print}, Timer(), Rounds(*arguments))["a"])

    assert rounds(5, 15, 0) == 5
    assert rounds(1, 15, 8) == 8
    assert rounds(1, 15, 100) == 15


def test_percentiles():
    assert summarise([float(i) for i in range(10, -1, -1)]) == {"median_ms": 5, "p10_ms": 1, "p90_ms": 9}
    assert summarise([2.0]) == {"median_ms": 2, "p10_ms": 2, "p90_ms": 2}


def test_peak_memory_sees_what_was_freed_within_the_call():
    def call() -> torch.Tensor:
        torch.ones(64 << 20, dtype=torch.uint8)
        return torch.ones(16 << 20, dtype=torch.uint8)

    peak, how = peak_memory(call, torch.device("cpu"))
    if peak is None:
        pytest.skip(how)
    assert 60 << 20 < peak < 100 << 20


def test_peak_memory_does_not_count_what_was_there():
    held = torch.ones(128 << 20, dtype=torch.uint8)
    peak, how = peak_memory(lambda: held.max(), torch.device("cpu"))
    if peak is None:
        pytest.skip(how)
    assert peak < 32 << 20
