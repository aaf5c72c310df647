"""`make mutate`: would the tests notice if a kernel were wrong?

Mutants of the kernels (schemata.py) are compiled for the emulator, all into one library, and the tests of the emulated
kernels run once for each that they reach. A mutant is caught if a test fails, or if the tests take far longer.
Survivors are compared with those that docs/testing-without-a-gpu.md explains.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutation.schemata import Mutant, kernel_sources, rewrite

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_WORK = _ROOT / "build" / "mutants"
_TESTS = ("tests/emulator/test_emulated_attention.py", "tests/emulator/test_launchers.py", "tests/ops")
_PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", "emulated or launchers", *_TESTS)
_PATIENCE = 4  # how many times as long as without a mutant the tests may take


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


def run_tests(**environment: str) -> subprocess.Popen[bytes]:
    """Starts the tests on the library with mutants."""
    environ = {**os.environ, "LLAVA_ST_EMULATED_SOURCES": str(_WORK / "csrc"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *_PYTEST],
        cwd=_ROOT,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def is_caught(mutant: Mutant, patience: float) -> bool:
    """Whether the tests fail, crash or hang with this mutant."""
    process = run_tests(LLAVA_ST_MUTANT=str(mutant.number))
    try:
        return process.wait(timeout=patience) != 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def explained(document: Path) -> set[tuple[str, str]]:
    """The survivors that the document lists: file and rule, and the source of the line."""
    found = re.findall(r"^- `(\S+): (.*)`$", document.read_text(), re.M) if document.exists() else []
    return set(found)


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
    os.environ["LLAVA_ST_EMULATED_SOURCES"] = str(_WORK / "csrc")
    from tests.emulator.build import build

    print(f"{len(mutants)} mutants; building all of them")
    build()
    reached_file = _WORK / "reached.txt"
    reached_file.unlink(missing_ok=True)
    begin = time.monotonic()
    if run_tests(LLAVA_ST_MUTANTS_REACHED=str(reached_file)).wait() != 0:
        sys.exit("the tests fail without any mutant")
    duration = time.monotonic() - begin
    reached = {int(line) for line in reached_file.read_text().split()}
    candidates = [m for m in mutants if m.number in reached and (not options.only or m.number in options.only)]
    print(
        f"the tests take {duration:.0f} s and reach {len(reached)} mutants; the others are no indices or have no code"
    )

    survivors = []
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        verdicts = pool.map(lambda mutant: is_caught(mutant, 10 + _PATIENCE * duration), candidates)
        for mutant, caught in zip(candidates, verdicts, strict=True):
            print("caught  " if caught else "SURVIVES", mutant, flush=True)
            if not caught:
                survivors.append(mutant)
    print(f"{len(survivors)} survivors")
    print(*survivors, sep="\n")
    print(f"caught {len(candidates) - len(survivors)} of {len(candidates)}")


if __name__ == "__main__":
    main()
