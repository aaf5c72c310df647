"""The Triton kernels compile for a GPU that need not be there, without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

POSITION_KERNELS = {
    "add_kernel",
    "add_packed_kernel",
    "sum_kernel",
    "add_slices_kernel",
    "scatter_kernel",
    "gather_kernel",
    "update_kernel",
    "losses_kernel",
    "gradients_kernel",
    "position_gelu_kernel",
    "gelu_gradient_kernel",
}
# Of the attention whose heads share keys: in one program, and in several.
SHARED_KERNELS = {"forward_kernel", "backward_kernel", "products_kernel", "pool_kernel", "row_gradients_kernel"}
ROOT = Path(__file__).parents[2]


def test_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """All kernels for sm_90, in a process of its own. The small regions must neither spill registers nor wait, and the
    kernels of positions and of shared keys must not spill any."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.triton.compile_ahead", "90"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "Cannot find ptxas" in run.stderr or "Cannot find cuobjdump" in run.stderr:
        pytest.skip("this Triton comes without ptxas or cuobjdump")
    assert run.returncode == 0, run.stderr[-3000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    dtypes = {record["dtype"] for record in records if record["case"] == "spatial"}
    assert dtypes == {"torch.float32", "torch.float16", "torch.bfloat16"}
    assert {record["dtype"] for record in records if record["kernel"] == "propagate_kernel"} == dtypes
    for record in records:
        assert record["stack"] <= (0 if record["kernel"] in POSITION_KERNELS else 64), record
        if record["form"] == "shared":
            assert record["kernel"] in SHARED_KERNELS, record
            assert record["stack"] == 0, record
            if record["case"] in ("spatial", "joint"):
                assert set(record["loads"]) == {"ld.global.v4.b32"}, record
            continue
        if record["case"] == "paper" and record["kernel"] in ("add_kernel", "add_packed_kernel", "gather_kernel"):
            assert "ld.global.v4.b32" in record["loads"], record
            assert "ld.global.b16" not in record["loads"], record
        if record["kernel"] not in ("forward_kernel", "backward_kernel"):
            continue
        if record["case"] in ("spatial", "temporal", "odd rows"):
            assert "ld.global.v4.b32" in record["loads"], record
            assert not {"ld.global.b16", "ld.global.b32"} & set(record["loads"]), record
            if record["form"] == "dense":
                assert record["barriers"] == record["stack"] == 0, record
    for dtype in ("torch.bfloat16", "torch.float32"):
        compiled = {r["kernel"] for r in records if r["case"] == "paper" and r["dtype"] == dtype}
        # The kernels of logits in fp32 are the same for all dtypes of hidden.
        assert compiled >= POSITION_KERNELS - {"update_kernel", "losses_kernel"}
    assert {r["kernel"] for r in records if r["case"] == "one of everything"} >= POSITION_KERNELS
    assert {r["kernel"] for r in records if r["form"] == "shared"} == SHARED_KERNELS
