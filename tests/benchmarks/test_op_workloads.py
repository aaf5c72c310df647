"""The benchmark's cases of single ops: every way computes the same, and their bytes are those of their tensors."""

from __future__ import annotations

import pytest
import torch

from benchmarks import (
    centers_workload,
    folded_workloads,
    masked_workload,
    packed_workloads,
    parity,
    position_workloads,
    propagation_workload,
)
from benchmarks.cases import MODES

MODULES = (centers_workload, folded_workloads, packed_workloads, propagation_workload)
BUILDERS = {name: build for module in MODULES for name, (build, _) in module.BUILDERS.items()}
BUILDERS |= {
    f"masked, {mode}": lambda clip, device, mode=mode: masked_workload.masked_workload(mode, clip, device, frames=1)
    for mode in MODES
}


@pytest.fixture(params=BUILDERS)
def workload(request, monkeypatch):
    """A small one, of random features."""

    def random_inputs(clip, frames, region, heads, dim, dtype, device):
        shapes = ((1, frames, 9, 9, heads, dim), *[(1, frames, 27, 27, heads, dim)] * 2)
        return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)

    def random_features(clip, frames, width, device):
        return torch.randn(1, frames, 27, 27, width)

    for module in (masked_workload, packed_workloads):
        monkeypatch.setattr(module, "attention_inputs", random_inputs)
    for module in (centers_workload, folded_workloads, packed_workloads):
        monkeypatch.setattr(module, "patch_features", random_features)
    for module in (centers_workload, packed_workloads, position_workloads, propagation_workload):
        monkeypatch.setattr(module, "WIDTH", 16)
    monkeypatch.setattr(packed_workloads, "LENGTHS", (1, 2))
    monkeypatch.setattr(packed_workloads, "HEAD_DIM", 16)
    monkeypatch.setattr(folded_workloads, "_frames_and_dtype", lambda device: (1, torch.float32))
    monkeypatch.setattr(folded_workloads, "VISION", 24)
    monkeypatch.setattr(folded_workloads, "EMBED", 32)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which takes long, and is torch's
    torch.manual_seed(0)
    return BUILDERS[request.param](None, torch.device("cpu"))


def test_all_agree(workload):
    truth = workload.truth()
    checked = [contender for contender in workload.contenders if contender.checked]
    found = {contender.name: parity.errors(contender.call()[: len(truth)], truth) for contender in checked}
    assert {contender.role for contender in checked} >= {"ours", "peer"}
    assert workload.baseline in found
    for contender in checked:
        errors = found[contender.name]
        assert errors.keys() == truth.keys()
        if contender.role == "ours":
            assert parity.within_tolerance(errors, found[workload.reference], truth, workload.dtype)
        else:
            assert max(errors.values()) < 1e-3


def test_bytes(workload):
    if workload.passes:
        read = sum(x.numel() * x.element_size() for tensors, _ in workload.passes for x in tensors)
        written = sum(sum(sizes) for _, sizes in workload.passes)
        described = workload.description
        # Tables are read, too, but are no part of what the floor moves.
        tables = 3 * 100 * 16 * 4 if described["kind"] == "lape_add_packed" else 0
        assert (described["bytes_read"], described["bytes_written"]) == (read + tables, written)


@pytest.mark.parametrize("workload", ["masked, forward"], indirect=True)
def test_the_mask_matters(workload):
    query, key, value = workload.passes[0][0]
    with_mask = workload.truth()["output"]
    without = parity.truth(query, key, value, torch.zeros_like(query), masked_workload.REGION)["output"]
    assert parity.max_abs_error(without, with_mask) > 0.1
