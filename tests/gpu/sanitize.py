"""`python -m tests.gpu.sanitize`: every CUDA kernel once, on small shapes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from llava_st_ops import point_to_region_attention, point_to_region_attention_packed, use_backend
from tests.attention_cases import CASES, gradients
from tests.ops.test_packed import GRIDS, packed_inputs


def main() -> None:
    with use_backend("cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case in CASES:
                inputs = case.inputs(dtype, "cuda")
                gradients(
                    lambda q, k, v, region=case.region: point_to_region_attention(q, k, v, region),
                    inputs,
                    torch.ones_like(inputs[0]),
                )
            for device in ("cpu", "cuda"):
                inputs, grid_thw = packed_inputs(GRIDS[1], (1, 3, 3), dtype=dtype, device="cuda")
                grid_thw = grid_thw.to(device)
                gradients(
                    lambda q, k, v, grid_thw=grid_thw: point_to_region_attention_packed(q, k, v, grid_thw, (1, 3, 3)),
                    inputs,
                    torch.ones_like(inputs[0]),
                )
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
