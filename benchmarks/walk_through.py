"""README's steps as a stranger takes them: from an empty environment to a module of their own, accelerated.

`python -m benchmarks.walk_through` gives README's commands in a folder of its own, and times each one. TORCH says which
torch `pip install torch` is to install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import ROOT, describe
from .pages import measure_command, replace_part
from .record import SCHEMA

RECORD = ROOT / "benchmarks" / "results" / "walk_through.json"
PAGE = ROOT / "docs" / "install.md"
# Stands for the reader's own model, of which this package knows nothing.
OWN_MODEL = ROOT / "benchmarks" / "integration_peers.py"
_BEFORE = """
import torch
from own_model import TokenPackerProjector

model = torch.nn.ModuleDict({"mm_projector": TokenPackerProjector(1024, 5120, 1024, 8, 4096, scale_factor=2)})
features = torch.randn(1, 576, 1024), torch.randn(1, 576, 5120)
before = model.mm_projector(features)
"""
_AFTER = """
after = model.mm_projector(features)
torch.testing.assert_close(after, before)
"""


def commands(readme: str) -> list[str]:
    """The commands of README's section on installing, without their comments."""
    found = re.search(r"^## Install\n+```\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError("README.md: expected a block of commands under '## Install'")
    return [line.split("  #")[0].strip() for line in found[1].splitlines()]


def as_tried(command: str) -> str:
    """README's command as it is given here: with a torch of one's choice, and where there is a compiler for GPUs but no
    GPU without its half of the build, as README says one may."""
    if command == "pip install torch":
        return f'pip install "{os.environ.get("TORCH", "torch==2.13.0")}"'
    spared = command.endswith(" .") and shutil.which("nvcc") and not torch.cuda.is_available()
    return f"LLAVA_ST_CUDA=off {command}" if spared else command


def program(readme: str) -> str:
    """README's lines that accelerate a model, between calls of that model."""
    found = re.search(r"```python\n(from llava_st_ops\.integrations import .*?)```", readme, re.DOTALL)
    if found is None:
        raise ValueError("README.md: expected a block of Python that imports from llava_st_ops.integrations")
    return _BEFORE + found[1] + _AFTER


def measure() -> dict[str, Any]:
    readme = (ROOT / "README.md").read_text()
    record = {"schema": SCHEMA, "environment": describe(torch.device("cpu")), "steps": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _clone(folder / "llava_st_ops")
        shutil.copyfile(OWN_MODEL, folder / "own_model.py")
        (folder / "accelerate.py").write_text(program(readme))
        program_step = f"python {folder / 'accelerate.py'}"
        for command in (*map(as_tried, commands(readme)), program_step):
            record["steps"].append(_run(command, source))
        record["steps"][-1]["command"] = "python accelerate.py"
    return record


def _clone(to: Path) -> Path:
    """What is committed, and nothing that lies about."""
    subprocess.run(["git", "clone", "--quiet", ROOT, to], check=True)
    return to


def _run(command: str, folder: Path) -> dict[str, Any]:
    """In a shell of its own, which finds the folder's environment first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAVA_ST"))}
    environment |= {"PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}"}
    began = time.perf_counter()
    result = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if result.returncode:
        raise RuntimeError(f"{command}\n{result.stdout}{result.stderr}")
    return {"command": command, "seconds": seconds, "said": result.stdout.strip().splitlines()[-2:]}


def table(record: dict[str, Any]) -> str:
    environment, steps = record["environment"], record["steps"]
    minutes, rest = divmod(round(sum(step["seconds"] for step in steps)), 60)
    return "\n".join(
        [
            f"{minutes} min {rest} s in all: {environment['device']}, {environment['cpu']['logical_cores']} cores, "
            f"packages from a mirror nearby, {environment['date'][:10]}, commit {environment['commit'][:12]}; "
            f"`benchmarks/results/{RECORD.name}`.",
            "",
            "| step | seconds |",
            "|---|---:|",
            *(f"| `{step['command']}` | {step['seconds']:.1f} |" for step in steps),
            "",
            "The last one said:",
            "",
            "```text",
            *steps[-1]["said"],
            "```",
        ]
    )


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "walk-through", table(record))


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
