"""Fixtures that all tests share."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import backends, use_backend

GPU = torch.cuda.is_available()
BACKENDS = ["cpu-avx2", "cpu-baseline", "reference", *(["cuda", "triton"] if GPU else ["emulated"])]


def pytest_report_header():
    return f"backends under test: {', '.join(BACKENDS)}" + (
        "" if GPU else " (no GPU: CUDA kernels are emulated, see tests/triton for the interpreter of Triton)"
    )


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    """Forces each backend of this machine in turn and gives the device that its tensors belong on.

    Triton has a folder of its own besides, since its interpreter runs a few small shapes only.
    """
    if request.param == "emulated":
        from tests.emulator.backend import emulated  # builds the emulated library

        with emulated(request.node.nodeid):
            yield torch.device("cpu")
        return
    backend, _, instruction_set = request.param.partition("-")
    device = torch.device("cuda" if GPU and backend != "cpu" else "cpu")
    verdict = backends.can_run(backend, "point_to_region_attention", device, torch.float32)
    if backend == "cpu" and not verdict.ok:
        pytest.fail(f"the CPU library must be there for the tests: {verdict.reason}")
    if not verdict.ok:
        pytest.skip(verdict.reason)
    if instruction_set == "baseline":
        monkeypatch.setenv("LLAVA_ST_CPU_ISA", "baseline")
    with use_backend(backend):
        yield device


@pytest.fixture
def poisoned_results():
    """Memory that torch allocates uninitialised holds NaN, so that entries nobody wrote show."""
    torch.use_deterministic_algorithms(True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(False)
