"""All records of a folder: of each machine and case the results, the newest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import record as records
from ..record import Measurement, Record


def machine_of(record: Record) -> str:
    """What two records must share to be compared."""
    environment = record["environment"]
    if environment["device_type"] == "cuda":
        return environment["device"]
    cpu = environment["cpu"]
    return f"{environment['device']}, {cpu['torch_threads']} threads, {cpu['instruction_set']}"


@dataclass(frozen=True)
class Result:
    """What one record has of one case."""

    file: str
    record: Record
    case: dict[str, Any]

    @property
    def name(self) -> str:
        return self.case["name"]

    @property
    def kind(self) -> str:
        return self.case["kind"]

    @property
    def machine(self) -> str:
        return machine_of(self.record)

    @property
    def baseline(self) -> str:
        """The implementation that ours are compared with: where the case does not name it, the first of others."""
        measured = (m for m in self.record["measurements"] if m["case"] == self.name and m["role"] != "ours")
        return self.case.get("baseline") or next((m["implementation"] for m in measured), "")

    def allocators(self) -> list[str]:
        """Settings under which it was measured. Errors and memory are those of the first."""
        return list(dict.fromkeys(m["allocator"] for m in self.record["measurements"] if m["case"] == self.name))

    def found(self, allocator: str) -> list[Measurement]:
        return records.measurements(self.record, self.name, allocator)

    def checked(self, implementation: str) -> Measurement:
        """The measurement that has errors and memory; empty where there is none."""
        first = self.found(self.allocators()[0])
        return next((m for m in first if m["implementation"] == implementation), {})

    def flops(self, implementation: str) -> int | None:
        """Of the matrix products that this way needs; the folded one needs fewer."""
        folded = implementation.endswith("folded") and "flops_folded" in self.case
        return self.case.get("flops_folded" if folded else "flops")

    def share_of_limit(self, allocator: str, mine: Measurement) -> float | None:
        """Of the rate at which this machine moves the case's bytes and does nothing else, or, for what is made of
        matrix products, of the rate of one large product. Both were measured in turn with the case."""
        found = self.found(allocator)
        if (floor := records.fastest(found, "floor")) is not None:
            return records.ratio(floor, mine)
        yardstick, flops = records.fastest(found, "yardstick"), self.flops(mine["implementation"])
        if yardstick is None or flops is None or "yardstick_flops" not in self.case:
            return None
        return flops / mine["median_ms"] / (self.case["yardstick_flops"] / yardstick["median_ms"])


@dataclass(frozen=True)
class Archive:
    """`runs`: records with cases, by file name, the newest first; `others`: all other records."""

    runs: dict[str, Record]
    others: dict[str, Record]

    @classmethod
    def read(cls, folder: Path) -> Archive:
        """Raises ValueError where a file is not JSON, or a record of a schema that this does not know."""
        runs: dict[str, Record] = {}
        others: dict[str, Record] = {}
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text())
            if "measurements" in found:
                runs[path.name] = records.read(path)
            else:
                others[path.name] = found
        newest = sorted(runs, key=lambda name: runs[name]["environment"]["date"], reverse=True)
        return cls({name: runs[name] for name in newest}, others)

    def results(self) -> Iterator[Result]:
        """All there are, the newest record first."""
        for file, record in self.runs.items():
            for case in record["cases"]:
                yield Result(file, record, case)

    def machines(self, device_type: str) -> list[str]:
        runs = (record for record in self.runs.values() if record["environment"]["device_type"] == device_type)
        return list(dict.fromkeys(machine_of(record) for record in runs))

    def history(self, machine: str) -> dict[str, list[Result]]:
        """Case -> its results on this machine, the newest first; cases in the order in which they are measured."""
        found: dict[str, list[Result]] = {}
        for result in self.results():
            if result.machine == machine:
                found.setdefault(result.name, []).append(result)
        return found

    def latest(self, machine: str) -> list[Result]:
        return [results[0] for results in self.history(machine).values()]

    def current(self, device_type: str) -> list[Result]:
        """Of each case the newest result on any machine of this type, by machine."""
        found: dict[str, Result] = {}
        for result in self.results():
            if result.record["environment"]["device_type"] == device_type:
                found.setdefault(result.name, result)
        order = self.machines(device_type)
        return sorted(found.values(), key=lambda result: order.index(result.machine))
