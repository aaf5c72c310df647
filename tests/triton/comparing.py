"""What the tests of the Triton kernels share."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_accurate

GPU = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Triton's interpreter is wrong in bfloat16 without saying so.
DTYPES = [F32, F16, pytest.param(BF16, marks=pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU"))]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
# The interpreter computes in NumPy, which warns of NaN and infinity.
ignores_numpy_warnings = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")


def random_like(shape, dtype, device, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual, exact, same, name):
    """As `assert_accurate`; in float32 two rounding steps of the largest entry pass at once.

    In float32 the reference's error in a handful of entries is no more than a few roundings, whose number is chance:
    the interpreter adds keys one after the other, a GPU divides and exponentiates to within two units.
    """
    if actual.dtype == F32 and actual.numel():
        floor = 2 * torch.finfo(F32).eps * exact.nan_to_num(0, 0, 0).abs().max()
        actual = torch.where((actual.double() - exact).abs() <= floor, same, actual)
    assert_accurate(actual, exact, same, name)


def assert_all_close(actual, exact, same, names):
    """Of several results, which must be contiguous."""
    for name, *triple in zip(names, actual, exact, same, strict=True):
        assert triple[0].is_contiguous()
        assert_close(*triple, name)


def assert_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def run_in_a_graph(run):
    """What `run()` gives when it is replayed from a CUDA graph, for which it must not wait for the device."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    return captured
