"""`make mutate`: would the tests notice if a kernel were wrong?

Mutants of the kernels (schemata.py) are compiled for the emulator, all into one library, and the tests of the emulated
kernels run once for each that they reach. A mutant is caught if a test fails, or if the tests take far longer.
docs/testing-without-a-gpu.md explains the survivors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import hypothesis  # noqa: F401 - forks need not import it again
import pytest
import torch

from tests.emulator import backend  # noqa: F401 - likewise
from tests.mutation.schemata import Mutant, kernel_sources, rewrite

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_WORK = _ROOT / "build" / "mutants"
_RECORD = _ROOT / "benchmarks" / "results" / "mutation.json"
_TESTS = ("tests/emulator/test_emulated_attention.py", "tests/emulator/test_launchers.py", "tests/ops")
_PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", "emulated or launchers", *_TESTS)
_PATIENCE = 3  # how many times as much processor time as without a mutant the tests may take


def write_sources() -> list[Mutant]:
    """A copy of csrc with all mutants in it."""
    target = _WORK / "csrc"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(_ROOT / "csrc", target)
    shutil.copy(_HERE / "mutants.h", target / "mutants.h")
    mutants: list[Mutant] = []
    for path in kernel_sources(target):
        text, more = rewrite(path.read_text(), path.relative_to(target).as_posix(), len(mutants))
        path.write_text(text)
        mutants += more
    return mutants


def environment(**more: str) -> dict[str, str]:
    return {"LLAVA_ST_EMULATED_SOURCES": str(_WORK / "csrc"), "OMP_NUM_THREADS": "1", **more}


def run_without_mutant(reached: Path) -> float:
    """How much processor time the tests take. Notes which mutants they could tell from the original."""
    reached.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "pytest", *_PYTEST]
    environ = {**os.environ, **environment(LLAVA_ST_MUTANTS_REACHED=str(reached))}
    result = subprocess.run(command, cwd=_ROOT, env=environ, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"the tests fail without any mutant\n{result.stdout}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def start(mutant: Mutant, patience: int) -> int:
    """Runs the tests with this mutant, in a fork of this process, which has imported what takes long; its number."""
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.environ.update(environment(LLAVA_ST_MUTANT=str(mutant.number)))
        status = int(pytest.main(list(_PYTEST)))
    finally:
        os._exit(status)


def verdicts(mutants: Iterable[Mutant], jobs: int, patience: int) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether the tests fail, crash or hang with it."""
    waiting = iter(mutants)
    running: dict[int, Mutant] = {}
    while True:
        for mutant in itertools.islice(waiting, jobs - len(running)):
            running[start(mutant, patience)] = mutant
        if not running:
            return
        child, status = os.wait()
        yield running.pop(child), status != 0


def write_record(path: Path, reached: int, survivors: list[Mutant]) -> None:
    """What docs/testing-without-a-gpu.md quotes."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True)
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "compiler": compiler.stdout.splitlines()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mutants": reached,
        "caught": reached - len(survivors),
        "survivors": [f"{mutant.file}: {mutant.rule}: {mutant.source.strip()}" for mutant in survivors],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--only", metavar="N", type=int, nargs="+", help="only these mutants")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    mutants = write_sources()
    if options.list:
        print(*mutants, sep="\n")
        return
    print(f"{len(mutants)} mutants; building all of them")
    os.environ.update(environment())
    subprocess.run([sys.executable, "-c", "from tests.emulator.build import build; build()"], cwd=_ROOT, check=True)
    reached_file = _WORK / "reached.txt"
    duration = run_without_mutant(reached_file)
    reached = {int(line) for line in reached_file.read_text().split()}
    candidates = [m for m in mutants if m.number in reached and (not options.only or m.number in options.only)]
    print(f"the tests take {duration:.0f} s and reach {len(reached)} mutants; of the others, most are not of integers")

    survivors = []
    for mutant, caught in verdicts(candidates, options.jobs, round(10 + _PATIENCE * duration)):
        print("caught  " if caught else "SURVIVES", mutant, flush=True)
        if not caught:
            survivors.append(mutant)
    survivors.sort(key=lambda mutant: mutant.number)
    print(f"{len(survivors)} survivors")
    print(*survivors, sep="\n")
    if not options.only:
        write_record(_RECORD, len(candidates), survivors)
    print(f"caught {len(candidates) - len(survivors)} of {len(candidates)}")


if __name__ == "__main__":
    main()
