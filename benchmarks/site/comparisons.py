"""Ours beside the others, and beside itself in the record before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .. import record as records
from ..record import Measurement
from .archive import Archive, Result


def faster_beyond_spread(one: Measurement, other: Measurement) -> bool:
    """Whether nine tenths of the samples of one are below nine tenths of the other's."""
    return one["p90_ms"] < other["p10_ms"]


@dataclass(frozen=True)
class Comparison:
    """Our fastest implementation of a case beside the others, under one allocator setting."""

    result: Result
    allocator: str
    ours: Measurement
    baseline: Measurement | None
    other: Measurement | None  # the fastest that is not ours

    @property
    def over_baseline(self) -> float | None:
        return records.ratio(self.baseline, self.ours)

    @property
    def over_other(self) -> float | None:
        return records.ratio(self.other, self.ours)

    @property
    def standing(self) -> str:
        """ "faster" or "slower" than all others, by more than the spread, or "level"."""
        if self.other is None:
            return "alone"
        if faster_beyond_spread(self.ours, self.other):
            return "faster"
        return "slower" if faster_beyond_spread(self.other, self.ours) else "level"

    @property
    def share_of_limit(self) -> float | None:
        return self.result.share_of_limit(self.allocator, self.ours)

    @property
    def checked(self) -> Measurement:
        return self.result.checked(self.ours["implementation"])


def comparisons(result: Result) -> list[Comparison]:
    """One per allocator setting under which ours has numbers."""
    found = []
    for allocator in result.allocators():
        measured = result.found(allocator)
        ours = records.fastest(measured, "ours")
        if ours is not None:
            baseline = records.named(measured, result.baseline)
            other = records.fastest(measured, "peer", "reference")
            found.append(Comparison(result, allocator, ours, baseline, other))
    return found


@dataclass(frozen=True)
class Change:
    """One of our implementations in the newest record, and in the one before on the same machine."""

    new: Result
    old: Result
    allocator: str
    now: Measurement
    before: Measurement

    @property
    def ratio(self) -> float:
        """Of the times: above 1 it got slower."""
        return self.now["median_ms"] / self.before["median_ms"]

    @property
    def ratio_of_baseline(self) -> float | None:
        """The same of the case's baseline, whose code is not ours: how much the machine changed."""
        now, before = (records.named(result.found(self.allocator), result.baseline) for result in (self.new, self.old))
        return records.ratio(now, before)

    @property
    def verdict(self) -> str:
        if faster_beyond_spread(self.now, self.before):
            return "faster"
        if not faster_beyond_spread(self.before, self.now):
            return "within the spread"
        baseline = self.ratio_of_baseline
        return "slower, and the baseline as much" if baseline is not None and baseline >= self.ratio else "slower"


def changes(archive: Archive) -> Iterator[Change]:
    """Of every implementation of ours that was measured twice. Where the name is new, it is compared with the fastest
    of ours in the record before."""
    machines = [*archive.machines("cuda"), *archive.machines("cpu")]
    for machine in machines:
        for new, *earlier in archive.history(machine).values():
            for allocator in new.allocators():
                old = next((result for result in earlier if allocator in result.allocators()), None)
                if old is None:
                    continue
                found = old.found(allocator)
                for now in records.timed(new.found(allocator), "ours"):
                    before = records.named(found, now["implementation"]) or records.fastest(found, "ours")
                    if before is not None:
                        yield Change(new, old, allocator, now, before)
