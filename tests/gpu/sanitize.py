"""`python -m tests.gpu.sanitize`: every CUDA kernel once, on small shapes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from llava_st_ops import (
    coordinate_cross_entropy,
    lape_add,
    lape_add_,
    lape_add_packed,
    lape_scatter,
    neighboring_token_propagation,
    point_to_region_attention,
    point_to_region_attention_packed,
    use_backend,
)
from tests.attention_cases import CASES, gradients
from tests.ops import test_coordinate_cross_entropy, test_lape_add, test_lape_scatter
from tests.ops.test_packed import GRIDS, packed_inputs


def run_attention(dtype: torch.dtype) -> None:
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


def run_positions(dtype: torch.dtype) -> None:
    for grid, channels, counts in test_lape_add.CASES:
        inputs = test_lape_add.inputs_of(grid, channels, counts, dtype, "cuda")
        gradients(lape_add, inputs, torch.ones_like(inputs[0]))
        lape_add_(*inputs)
    for device in ("cpu", "cuda"):
        grid_thw = torch.tensor(test_lape_add.GRIDS, device=device)
        inputs = test_lape_add.inputs_of((int(grid_thw.prod(1).sum()),), 24, (6, 11, 9), dtype, "cuda")
        gradients(lambda *x, grid_thw=grid_thw: lape_add_packed(*x, grid_thw), inputs, torch.ones_like(inputs[0]))
    for channels in (7, 64):
        values = test_lape_scatter.problem(60, channels, dtype, "cuda")
        sources = [values[name] for name in test_lape_scatter.NAMES]
        gradients(test_lape_scatter.bound(lape_scatter, values), sources, torch.ones_like(lape_scatter(**values)))
        values = test_coordinate_cross_entropy.problem(60, channels, 333, dtype, "cuda")
        sources = [values[name] for name in test_coordinate_cross_entropy.SOURCES]
        loss = test_coordinate_cross_entropy.bound(coordinate_cross_entropy, values)
        gradients(loss, sources, torch.ones((), device="cuda"))
    table = torch.randn(100, 130, device="cuda").to(dtype)
    gradients(neighboring_token_propagation, [table], torch.ones_like(table))


def main() -> None:
    with use_backend("cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run_attention(dtype)
            run_positions(dtype)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
