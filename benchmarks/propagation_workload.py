"""Neighbouring-token propagation of a table: ours, linear in anchors, beside the published product of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

import llava_st_ops
from llava_st_ops import reference

from .clip import Clip
from .position_workloads import ANCHORS, WIDTH
from .workloads import Workload, bytes_of, describe, on_each_backend, seeded, workload_of


def propagation_workload(clip: Clip, device: torch.device) -> Workload:
    """The table as it is, and its gradient, which is where the work lies."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table, grad = (seeded((ANCHORS, WIDTH), seed, dtype, device) for seed in (1, 2))
    distance = torch.arange(ANCHORS, device=device).unsqueeze(1) - torch.arange(ANCHORS, device=device)
    matrix = (0.5 ** distance.abs()).to(dtype)

    def eager(table: Tensor) -> Tensor:
        spread = matrix @ table
        return table + spread - spread.detach()

    torch.compiler.reset()  # what was compiled for earlier cases
    baseline = "eager, as published"
    return workload_of(
        describe(
            f"neighboring_token_propagation {ANCHORS} anchors",
            "forward+backward",
            dtype,
            "LLaVA-ST's tables",
            baseline,
            bytes_read=bytes_of(grad),
            bytes_written=bytes_of(table),
            bytes_counted="the gradient of the result read, that of the table written; the result is the table itself",
        ),
        ("output", "grad_table"),
        [table],
        (grad,),
        reference.neighboring_token_propagation,
        [
            *on_each_backend(llava_st_ops.neighboring_token_propagation, device, dtype),
            (baseline, "peer", eager),
            ("eager, compiled", "peer", torch.compile(eager, dynamic=False, fullgraph=True)),
        ],
    )


# As in position_workloads.
BUILDERS = {"neighboring_token_propagation, forward+backward": (propagation_workload, False)}
