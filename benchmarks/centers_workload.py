"""The centres of regions, which seed a packer's queries: a view of ours beside the published interpolation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import llava_st_ops

from .clip import Clip, patch_features
from .position_workloads import WIDTH
from .workloads import Contender, Function, Workload, bytes_of, call_of, describe

REGION = (1, 3, 3)


def interpolated(x: Tensor) -> Tensor:
    """As published: channels second, frame by frame."""
    _, rows, columns = (size // side for size, side in zip(x.shape[1:4], REGION, strict=True))
    return interpolate(x[0].permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear").permute(0, 2, 3, 1)[None]


def centers_workload(clip: Clip, device: torch.device) -> Workload:
    """Spatial regions of `region_centers`."""
    frames, dtype = (100, torch.bfloat16) if device.type == "cuda" else (40, torch.float32)
    features = patch_features(clip, frames, WIDTH, device).to(dtype)

    def truth() -> dict[str, Tensor]:
        return {"output": interpolated(features.double())}

    def contender(name: str, role: str, function: Function) -> Contender:
        return Contender(name, role, call_of(function, [features], [], None))

    torch.compiler.reset()  # what was compiled for earlier cases
    baseline = "interpolate, as published"
    size = bytes_of(features) // REGION[1] // REGION[2]
    return Workload(
        description=describe(
            f"region_centers {frames} frames",
            "forward",
            dtype,
            "the seeds of LLaVA-ST's spatial packer, copied where they are only a view",
            baseline,
            bytes_read=size,
            bytes_written=size,
            bytes_counted="the centres read and written once",
        ),
        contenders=[
            contender("llava_st_ops", "ours", lambda x: llava_st_ops.region_centers(x, REGION).contiguous()),
            contender(baseline, "peer", lambda x: interpolated(x).contiguous()),
            contender(
                "interpolate, compiled",
                "peer",
                torch.compile(lambda x: interpolated(x).contiguous(), dynamic=False, fullgraph=True),
            ),
        ],
        truth=truth,
        reference=baseline,
        passes=[],
        dtype=dtype,
    )


# As in position_workloads.
BUILDERS = {"region_centers, forward": (centers_workload, False)}
