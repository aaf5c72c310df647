"""The benchmark's case with a mask: every way computes the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import masked_workload as masked
from benchmarks import parity


@pytest.fixture
def workload(request, monkeypatch):
    def random_inputs(clip, frames, region, heads, dim, dtype, device):
        shapes = ((1, frames, 9, 9, heads, dim), *[(1, frames, 27, 27, heads, dim)] * 2)
        return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)

    monkeypatch.setattr(masked, "attention_inputs", random_inputs)
    return masked.masked_workload(request.param, None, torch.device("cpu"), frames=1)


@pytest.mark.parametrize("workload", masked.MODES, indirect=True)
def test_all_agree(workload):
    truth = workload.truth()
    found = {contender.name: parity.errors(contender.call(), truth) for contender in workload.contenders}
    assert len(found) == 4
    for errors in found.values():
        assert errors.keys() == truth.keys()
        assert parity.within_tolerance(errors, found[workload.reference], truth, workload.dtype)


@pytest.mark.parametrize("workload", ["forward"], indirect=True)
def test_the_mask_matters(workload):
    query, key, value = workload.passes[0][0]
    with_mask = workload.truth()["output"]
    without = parity.truth(query, key, value, torch.zeros_like(query), masked.REGION)["output"]
    assert parity.max_abs_error(without, with_mask) > 0.1


@pytest.mark.parametrize("workload", masked.MODES, indirect=True)
def test_bytes(workload):
    read = sum(x.numel() * x.element_size() for tensors, _ in workload.passes for x in tensors)
    assert workload.description["bytes_read"] == read
    assert workload.description["bytes_written"] == sum(sum(written) for _, written in workload.passes)
