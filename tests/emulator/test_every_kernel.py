"""No CUDA kernel is left out: whatever is in csrc/cuda runs in the emulator, in every dtype that it has."""

from __future__ import annotations

import re

import pytest
import torch

from llava_st_ops import neighboring_token_propagation
from tests.attention_cases import Case, gradients
from tests.emulator.backend import DTYPES, emulated, launched
from tests.emulator.build import source_folder

_ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
# They read grids, int32 or int64, or logits, which are float in any case.
_OF_NO_DTYPE = {"locate_videos", "find_targets", "update_statistics", "finish_losses", "accumulate"}
_IN_FLOAT = {("logit_gradient", torch.float16)}  # whose range is too small for it
_OF_16_BITS = {"normalized_tile_forward", "normalized_tile_backward"}  # what the tensor cores multiply


def kernels_in_sources() -> set[str]:
    kernel = re.compile(r"LLAVA_ST_GLOBAL void (?:LLAVA_ST_LAUNCH_BOUNDS\(.*\)\s+)?(\w+)\(")
    texts = [path.read_text() for path in (source_folder() / "cuda").rglob("*.cuh")]
    return {name for text in texts for name in kernel.findall(text)}


def run_every_op(dtype: torch.dtype, grids: torch.dtype) -> None:
    """A call and its gradient of each op that has a CUDA kernel. A new one belongs here."""
    with emulated(str(dtype)) as ops:
        case = Case(1, (2, 3, 3), (1, 3, 3), 1, 8)
        inputs = case.inputs(dtype)
        gradients(lambda *x: ops.point_to_region_attention(*x, case.region), inputs, torch.ones_like(inputs[0]))
        packed = [x.flatten(0, 3) for x in inputs]
        grid_thw = torch.tensor([case.grid], dtype=grids)
        gradients(
            lambda *x: ops.point_to_region_attention_packed(*x, grid_thw, case.region),
            packed,
            torch.ones_like(packed[0]),
        )
        table = torch.ones(3, 4, dtype=dtype)
        gradients(neighboring_token_propagation, [table], torch.ones_like(table))
        run_normalized_attention(ops, dtype)
        run_lape_add(ops, dtype, grids)
        run_lape_scatter(ops, dtype, grids)
        run_loss(ops, dtype, grids)
        run_lape_mlp(ops, dtype)


def run_normalized_attention(ops, dtype: torch.dtype) -> None:
    """Rows of eight channels, which the tensor cores take in 16 bits, and rows that they do not."""
    for width in (8, 7):
        query, tokens = torch.ones(1, 1, 1, 1, 2, width, dtype=dtype), torch.ones(1, 1, 2, 2, width, dtype=dtype)
        ops.normalized_region_attention(query, tokens, tokens, [1, 2, 2])
        ops.normalized_region_attention_backward(query, query, tokens, tokens, [1, 2, 2])


def run_lape_add(ops, dtype: torch.dtype, grids: torch.dtype) -> None:
    tables = [torch.ones(3, 8, dtype=dtype)] * 3
    video = torch.ones(1, 2, 2, 2, 8, dtype=dtype)
    ops.lape_add(video, *tables)
    ops.lape_add_(video, *tables)
    ops.lape_add_backward(video, *tables)
    grid_thw = torch.tensor([[2, 2, 2]], dtype=grids)
    ops.lape_add_packed(video.flatten(0, 3), *tables, grid_thw)
    ops.lape_add_packed_backward(video.flatten(0, 3), *tables, grid_thw)


def run_lape_scatter(ops, dtype: torch.dtype, integers: torch.dtype) -> None:
    """A text token and an anchor; in the backward pass so many that entries are summed in segments."""
    embed, tables = torch.ones(3, 8, dtype=dtype), [torch.ones(3, 8, dtype=dtype)] * 3
    axis, nowhere = torch.tensor([-1, 0], dtype=torch.int8), torch.tensor([-1, -1], dtype=integers)
    ops.lape_scatter(embed, *tables, nowhere + 1, axis, torch.tensor([0.0, 0.3]).double(), nowhere, embed)
    entries = torch.zeros(64, dtype=torch.int64)
    ops.lape_scatter_backward(embed, entries, entries, entries.double(), embed, *tables, embed)


def run_loss(ops, dtype: torch.dtype, integers: torch.dtype) -> None:
    """A word and a coordinate."""
    rows, tables = torch.ones(2, 8, dtype=dtype), [torch.ones(3, 8, dtype=dtype)] * 3
    axis, positions = torch.tensor([-1, 0], dtype=torch.int8), torch.tensor([0.0, 0.3]).double()
    arguments = (rows, rows, *tables, torch.ones(2, dtype=integers), axis, positions)
    losses, logsumexp = ops.coordinate_cross_entropy(*arguments)
    ops.coordinate_cross_entropy_backward(losses, logsumexp, *arguments, -100, True, True, True)


def run_lape_mlp(ops, dtype: torch.dtype) -> None:
    rows, tables = torch.ones(2, 8, dtype=dtype), [torch.ones(2, 2, dtype=dtype)] * 3
    ops.linear_lape_gelu(torch.ones(1, 2, 2, 2, 8, dtype=dtype), rows, rows[:, 0], *tables)
    ops.gelu_linear_gradient(rows, rows.t(), rows[:, :2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_runs(dtype):
    kernels = kernels_in_sources()
    assert {"attention_forward", "attention_backward"} < kernels
    with launched() as names:
        for grids in (torch.int32, torch.int64):
            run_every_op(dtype, grids)
    for kernel in kernels - (_OF_16_BITS if dtype == torch.float32 else set()):
        of_kernel = [name for name in names if re.search(rf"\b{kernel}\b", name)]
        if kernel not in _OF_NO_DTYPE:
            element = "float" if (kernel, dtype) in _IN_FLOAT else _ELEMENTS[dtype]
            of_kernel = [name for name in of_kernel if re.search(rf"\b{element}\b", name)]
        assert of_kernel, f"{kernel} did not run in {dtype}; run_every_op should call its op"
    assert sum("locate_videos<" in name for name in names) == 2
