"""`make mutate`: would the tests notice if a kernel were wrong?

Mutants of the kernels (schemata.py) are compiled for the emulator, all into one library, and the tests of the emulated
kernels run once for each. A mutant is caught if a test fails, if the tests crash, or if they take far longer; one that
no test reaches is not. docs/testing-without-a-gpu.md explains the survivors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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
# Those of the CUDA kernels alone, by the folder of the kernel; shared files take all. Most of what all backends have in
# common is left out, to save half of the time.
_ATTENTION = ("tests/emulator/test_emulated_attention.py", "tests/emulator/test_launchers.py")
_ADD = ("tests/emulator/test_emulated_lape_add.py", "tests/emulator/test_launchers.py")
_SCATTER = ("tests/emulator/test_emulated_lape_scatter.py", "tests/emulator/test_launchers.py")
_TESTS = {
    "cuda/point_to_region_attention/": _ATTENTION,
    "cuda/lape_add/": _ADD,
    "cuda/lape_scatter/": _SCATTER,
    "cuda/linear_lape_gelu/": ("tests/emulator/test_emulated_linear_lape_gelu.py", "tests/emulator/test_launchers.py"),
    "cuda/normalized_region_attention/": ("tests/emulator/test_emulated_normalized_attention.py",),
    "cuda/coordinate_cross_entropy/": ("tests/ops/test_coordinate_cross_entropy.py",),
    "cuda/propagate_to_neighbors/": ("tests/ops/test_neighboring_token_propagation.py",),
}
_PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", "(emulated or launchers) and not compile")
_NO_VERDICT = 100
_PATIENCE = 2  # how many times as much processor time as without a mutant the tests may take


def tests_of(file: str) -> list[str]:
    """The tests that should notice a fault in a source file."""
    found = [tests for folder, tests in _TESTS.items() if file.startswith(folder)] or _TESTS.values()
    return sorted({test for tests in found for test in tests})


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
    command = [sys.executable, "-m", "pytest", *_PYTEST, *tests_of("")]
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
    status = _NO_VERDICT
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))
        signal.alarm(20 * patience)  # for one that waits for ever
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.environ.update(environment(LLAVA_ST_MUTANT=str(mutant.number)))
        status = int(pytest.main([*_PYTEST, *tests_of(mutant.file)]))
    finally:
        os._exit(status)


def verdict(status: int) -> str:
    """What a child's exit status says of its mutant."""
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM) else "crashes"
    code = os.WEXITSTATUS(status)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the tests did not run: pytest ended with status {code}")
    return "fails" if code == pytest.ExitCode.TESTS_FAILED else "survives"


def verdicts(mutants: Iterable[Mutant], jobs: int, patience: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant, and whether with it the tests fail, crash, hang, or pass."""
    waiting = iter(mutants)
    running: dict[int, Mutant] = {}
    while True:
        for mutant in itertools.islice(waiting, jobs - len(running)):
            running[start(mutant, patience)] = mutant
        if not running:
            return
        child, status = os.wait()
        yield running.pop(child), verdict(status)


def write_record(path: Path, kinds: Counter[str], survivors: list[Mutant]) -> None:
    """What docs/testing-without-a-gpu.md quotes."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True)
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "compiler": compiler.stdout.splitlines()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mutants": kinds.total(),
        "caught": kinds.total() - len(survivors),
        "tests with a mutant": dict(sorted(kinds.items())),
        "survivors": [mutant.name() for mutant in survivors],
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
    reached = dict(line.split() for line in reached_file.read_text().splitlines())
    chosen = [mutant for mutant in mutants if not options.only or mutant.number in options.only]
    chosen = [mutant for mutant in chosen if reached.get(str(mutant.number)) != "o"]  # no integers: no index
    candidates = [mutant for mutant in chosen if str(mutant.number) in reached]
    survivors = [mutant for mutant in chosen if str(mutant.number) not in reached]
    print(f"the tests take {duration:.0f} s and reach {len(candidates)} of {len(chosen)} mutants", flush=True)

    kinds = Counter({"do not reach it": len(survivors)})
    for mutant, kind in verdicts(candidates, options.jobs, round(10 + _PATIENCE * duration)):
        print(f"{kind:8}", mutant, flush=True)
        kinds[kind] += 1
        if kind == "survives":
            survivors.append(mutant)
    survivors.sort(key=lambda mutant: mutant.number)
    print(f"{len(survivors)} survivors")
    print(*survivors, sep="\n")
    if not options.only:
        write_record(_RECORD, kinds, survivors)
    print(f"caught {len(chosen) - len(survivors)} of {len(chosen)}")


if __name__ == "__main__":
    main()
