"""Timing: implementations take turns, so that a change of the machine's speed meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """How many samples to take of each call: `fewest`, and on up to `most` while less than `seconds` have passed."""

    fewest: int
    most: int
    seconds: float


class CpuTimer:
    """Wall-clock time of a call, in ms. Caches are as the call before left them: the tensors exceed them."""

    description = "wall clock; results are freed after the clock stops"

    def __init__(self, settle_s: float = 0.002) -> None:
        # Threads of the call before spin for a moment before they sleep, and would take a core from the next call.
        self._settle_s = settle_s

    def sample(self, call: Call) -> float:
        time.sleep(self._settle_s)
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        del result
        return (stop - start) * 1e3


class CudaTimer:
    """Device time of a call between two events, in ms, with a cold L2 cache.

    The device is kept busy while the host queues the call, so the time is that of the kernels, not of launching them.
    """

    description = "CUDA events; the L2 cache is overwritten before each sample; launch time is hidden"

    def __init__(self, device: torch.device, busy_cycles: int = 10_000_000) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._busy_cycles = busy_cycles
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def sample(self, call: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(self._busy_cycles)
        self._flush.zero_()
        start.record()
        result = call()
        stop.record()
        torch.cuda.synchronize(self._device)
        del result
        return start.elapsed_time(stop)


Timer = CpuTimer | CudaTimer


def make_timer(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    rounds: Rounds,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Samples in ms of every call, taken in turns, each round beginning with another: A B C, B C A, C A B, ...

    What a call leaves behind (freed memory, warm caches) would otherwise always meet the same next one.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    began = time.perf_counter()
    done = 0
    while done < rounds.fewest or (done < rounds.most and time.perf_counter() - began < rounds.seconds):
        progress(done)
        for name in order:
            samples[name].append(timer.sample(calls[name]))
        order.append(order.pop(0))
        done += 1
    return samples


def summarise(samples: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, interpolated."""
    if len(samples) == 1:
        return {"median_ms": samples[0], "p10_ms": samples[0], "p90_ms": samples[0]}
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median_ms": statistics.median(samples), "p10_ms": deciles[0], "p90_ms": deciles[-1]}
