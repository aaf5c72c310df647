"""Runs one workload: parity, warm-up, peak memory, then interleaved timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import floor, parity
from .environment import device_state
from .measure import Rounds, Timer, interleave, summarise
from .memory import peak_memory
from .workloads import Contender, Workload

SLOWNESS_LIMIT = 20  # a peer this many times slower than the baseline is named, not sampled
FLOORS_KEPT = 3  # of the floor's kernels, those that win a trial are sampled with the rest


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long."""

    rounds: Rounds
    check: bool  # parity and peak memory; off in the second of two processes, which computes the same
    allocator: str  # "default" or "huge pages"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _check(workload: Workload, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Errors of every contender against float64. A contender that fails loses its call and keeps the reason."""
    expected = workload.truth()
    found: dict[str, dict[str, float]] = {}
    for contender in workload.contenders:
        if contender.call is None or not contender.checked:
            continue
        say(f"parity of {contender.name}")
        try:
            found[contender.name] = parity.errors(contender.call()[: len(expected)], expected)
        except Exception as error:  # a peer's failure is a finding, whatever its type
            contender.call, contender.reason = None, _first_line(error)
    if workload.reference not in found:
        reason = next(c.reason for c in workload.contenders if c.name == workload.reference)
        raise RuntimeError(f"{workload.name}: the reference failed: {reason}")
    of_reference = found[workload.reference]
    return {
        name: {
            "errors": errors,
            "max_abs_error": max(errors.values()),
            "error_over_reference": parity.over_reference(errors, of_reference),
            "within_tolerance": parity.within_tolerance(errors, of_reference, expected, workload.dtype),
        }
        for name, errors in found.items()
    }


def _warm_up(workload: Workload, timer: Timer, calls: int, say: Callable[[str], None]) -> None:
    """Calls each contender, so that it is compiled and settled. Drops peers that are too slow to be sampled."""
    times: dict[str, float] = {}
    for contender in workload.contenders:
        if contender.call is None:
            continue
        say(f"warm-up of {contender.name}")
        try:
            times[contender.name] = [timer.sample(contender.call) for _ in range(calls)][-1]
        except Exception as error:  # as above
            contender.call, contender.reason = None, _first_line(error)
    limit = SLOWNESS_LIMIT * times.get(workload.baseline, float("inf"))
    for contender in workload.contenders:
        if contender.call is not None and contender.role == "peer" and times[contender.name] > limit:
            # Once more: other processes on the machine can hold up a single call for long.
            times[contender.name] = min(times[contender.name], timer.sample(contender.call))
    for contender in workload.contenders:
        if contender.call is not None and contender.role == "peer" and times[contender.name] > limit:
            contender.call = None
            contender.reason = (
                f"a warm call took {times[contender.name]:.0f} ms, more than {SLOWNESS_LIMIT} times the baseline's "
                f"{limit / SLOWNESS_LIMIT:.0f} ms: not sampled"
            )


def _floor_calls(workload: Workload, device: torch.device, timer: Timer) -> dict[str, Callable[[], object]]:
    """On a CPU the fastest kernels of floor.cpp, on a GPU a device copy of as many bytes."""
    if not workload.passes:
        return {}
    if device.type == "cuda":
        read = sum(x.numel() * x.element_size() for tensors, _ in workload.passes for x in tensors)
        written = sum(sum(sizes) for _, sizes in workload.passes)
        source, target = (torch.zeros((read + written) // 2, dtype=torch.int8, device=device) for _ in range(2))
        return {"floor: device copy": lambda: target.copy_(source)}
    threads = torch.get_num_threads()

    def call(variant: floor.Variant) -> Callable[[], object]:
        return lambda: [floor.move(tensors, sizes, variant, threads) for tensors, sizes in workload.passes]

    calls = {variant.name: call(variant) for variant in floor.VARIANTS}
    trial = {name: min(samples) for name, samples in interleave(calls, timer, Rounds(2, 2, 0)).items()}
    return {name: calls[name] for name in sorted(trial, key=trial.__getitem__)[:FLOORS_KEPT]}


def run(
    workload: Workload, device: torch.device, timer: Timer, settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One measurement per contender and per floor, as the record holds them."""
    checked = _check(workload, say) if settings.check else {}
    _warm_up(workload, timer, 1 if settings.check else 2, say)
    memory: dict[str, tuple[int | None, str]] = {}
    if settings.check:
        say("peak memory")
        memory = {c.name: peak_memory(c.call, device) for c in workload.contenders if c.call is not None}
    calls: dict[str, Callable[[], object]] = {c.name: c.call for c in workload.contenders if c.call is not None}
    contenders = list(workload.contenders)
    say("trial of the floor's kernels")
    try:
        floors = _floor_calls(workload, device, timer)
        contenders += [Contender(name, "floor", None) for name in floors]
    except floor.FloorError as error:
        floors = {}
        contenders.append(Contender("floor", "floor", None, str(error)))
    rounds = settings.rounds
    if workload.rounds is not None:
        fewest = min(rounds.fewest, workload.rounds)
        rounds = Rounds(fewest, fewest, 0)
    most = rounds.most
    samples = interleave(calls | floors, timer, rounds, lambda done: say(f"round {done + 1}, at most {most}"))
    state = device_state(device)
    return [
        _measurement(workload.name, settings.allocator, contender, samples, checked, memory, state)
        for contender in contenders
    ]


def _measurement(
    case: str,
    allocator: str,
    contender: Contender,
    samples: Mapping[str, list[float]],
    checked: Mapping[str, dict[str, Any]],
    memory: Mapping[str, tuple[int | None, str]],
    state: dict[str, Any],
) -> dict[str, Any]:
    measurement: dict[str, Any] = {
        "case": case,
        "allocator": allocator,
        "implementation": contender.name,
        "role": contender.role,
        "reason_without_numbers": contender.reason or None,
        **checked.get(contender.name, {}),
    }
    if contender.name in samples:
        measurement |= {"samples_ms": samples[contender.name], **summarise(samples[contender.name])}
        measurement["device_state"] = state
    if contender.name in memory:
        peak, how = memory[contender.name]
        measurement |= {"peak_memory_bytes": peak, "peak_memory_measured": how}
    return measurement
