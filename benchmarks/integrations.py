"""Modules of other packages before and after llava_st_ops.integrations, on two threads of a CPU.

`python -m benchmarks.integrations` measures, writes `benchmarks/results/integrations.json`, and makes the table of
docs/integrations.md anew from it (`--report` does that alone).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llava_st_ops import integrations

from . import integration_peers as peers
from .environment import ROOT, describe
from .measure import CpuTimer, Rounds, interleave, summarise
from .pages import measure_command, replace_part
from .record import SCHEMA

RECORD = ROOT / "benchmarks" / "results" / "integrations.json"
PAGE = ROOT / "docs" / "integrations.md"
THREADS = 2
MODES = ("forward", "forward+backward")
BEFORE, AFTER = "eager, as published", "accelerated"
ROUNDS = Rounds(fewest=15, most=40, seconds=6)


@dataclass(frozen=True)
class Case:
    """A module at its published sizes, what accelerates it, and the arguments of a call."""

    name: str
    make: Callable[[], nn.Module]
    accelerate: Callable[[nn.Module], integrations.Report]
    inputs: Callable[[], tuple[Any, ...]]


def _llava_st(name: str, temporal: bool, shape: tuple[int, int, int]) -> Case:
    attribute = "token_packer_slow" if temporal else "token_packer"  # packers are known by their names
    return Case(
        name,
        functools.partial(peers.LlavaStPacker, shape[-1], 1024, 8, temporal),
        lambda packer: integrations.accelerate_llava_st(nn.ModuleDict({attribute: packer})),
        lambda: (torch.randn(shape),),
    )


def _windows(queries: int, sides: Sequence[int], width: int) -> tuple[Tensor, ...]:
    """What a sampler's layer is called with; a tenth of the keys is not seen."""
    windows = [torch.randn(queries, side * side, width) for side in sides]
    masks = [torch.rand(queries, side, side) > 0.1 for side in sides]
    return torch.randn(queries, 1, width), torch.randn(queries, 1, width), *windows, *masks


def _sampler(name: str, queries: int, sides: Sequence[int], width: int = 1024) -> Case:
    return Case(
        name,
        lambda: peers.SamplerLayer(width, width, [width] * len(sides), sides, width),
        integrations.accelerate_vision_sampler,
        lambda: _windows(queries, sides, width),
    )


CASES = [
    _llava_st("LLaVA-ST, spatial packer, 3 frames of 27 x 27", False, (3, 729, 3584)),
    _llava_st("LLaVA-ST, temporal packer, 25 frames of 9 x 9", True, (25, 81, 3584)),
    *(
        Case(
            f"TokenPacker, scale {scale}, 2 images of 24 x 24",
            functools.partial(peers.TokenPackerProjector, 1024, 4096, 1024, 8, 4096, scale),
            integrations.accelerate_token_packer,
            lambda: ((torch.randn(2, 576, 1024), torch.randn(2, 576, 4096)),),
        )
        for scale in (2, 3, 4)
    ),
    *(
        Case(
            f"Oryx, {kind}, 16 frames of 24 x 32",
            functools.partial(peers.OryxCompressor, 1152),
            integrations.accelerate_oryx,
            functools.partial(lambda kind: (torch.randn(16, 24 * 32, 1152), kind, (24, 32)), kind),
        )
        for kind in ("video", "video_long")
    ),
    _sampler("Cambrian, 144 queries, windows 1, 1, 1 and 16", 144, (1, 1, 1, 4)),
    _sampler("LongVU, 144 queries, windows 4 and 4", 144, (2, 2)),
]


def measure_case(case: Case, mode: str, rounds: Rounds = ROUNDS) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    before = case.make()
    after = copy.deepcopy(before)
    report = case.accelerate(after)
    if len(report.replaced) != 1:
        raise RuntimeError(f"expected one module to be replaced: {report}")
    inputs = case.inputs()
    modules = {BEFORE: before, AFTER: after}
    with torch.no_grad():
        exact = _first(copy.deepcopy(before).double()(*_map(Tensor.double, inputs)))
        errors = {
            name: (_first(module(*inputs)).double() - exact).abs().max().item() for name, module in modules.items()
        }
    calls = {name: _call(module, inputs, mode) for name, module in modules.items()}
    for call in calls.values():
        call()
    samples = interleave(calls, CpuTimer(), rounds)
    return [
        {
            "case": f"{case.name}, {mode}",
            "allocator": "default",
            "implementation": name,
            "role": "ours" if name == AFTER else "peer",
            "errors": {"output": errors[name]},
            "samples_ms": samples[name],
            **summarise(samples[name]),
        }
        for name in modules
    ]


def _map(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def _first(outputs: Any) -> Tensor:
    return tree_leaves(outputs)[0]


def _call(module: nn.Module, inputs: Any, mode: str) -> Callable[[], object]:
    """Backward: the gradients of all parameters and of the features."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return _first(module(*inputs))

        return forward
    inputs = _map(lambda x: x.clone().requires_grad_(), inputs)
    wanted = [x for x in (*tree_leaves(inputs), *module.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    grad = torch.randn_like(_first(module(*inputs)))
    return lambda: torch.autograd.grad(_first(module(*inputs)), wanted, grad)


def measure() -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    record = {
        "schema": SCHEMA,
        "environment": describe(torch.device("cpu")),
        "settings": {"dtype": "float32", "timer": CpuTimer.description},
        "cases": [
            {"name": f"{case.name}, {mode}", "kind": "integration", "mode": mode} for case in CASES for mode in MODES
        ],
        "measurements": [],
    }
    for case in CASES:
        for mode in MODES:
            record["measurements"] += measure_case(case, mode)
    return record


def table(record: dict[str, Any]) -> str:
    environment = record["environment"]
    rows = [
        f"**{environment['device']}**, {environment['cpu']['torch_threads']} threads, load average at the start "
        f"{environment['cpu']['load_average_1min']:.1f}, torch {environment['versions']['torch']}, "
        f"{environment['date'][:10]}, commit {environment['commit'][:12]}, float32; "
        f"`benchmarks/results/{RECORD.name}`.",
        "",
        "| module | published, ms (p10..p90) | accelerated, ms (p10..p90) | times faster | error / published's |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in record["cases"]:
        found = {m["implementation"]: m for m in record["measurements"] if m["case"] == case["name"]}
        before, after = found[BEFORE], found[AFTER]
        times = [f"{m['median_ms']:.1f} ({m['p10_ms']:.1f}..{m['p90_ms']:.1f})" for m in (before, after)]
        error = after["errors"]["output"] / before["errors"]["output"]
        faster = before["median_ms"] / after["median_ms"]
        rows.append(f"| {case['name']} | {' | '.join(times)} | {faster:.2f} | {error:.2f} |")
    return "\n".join(rows)


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "times", table(record))


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
