"""The right twins of the emulator's zoo on a GPU: the hardware must do what the emulator says that it does."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from tests.gpu.zoo import build, library_path
from tests.zoo_results import INPUT, KERNELS, RESULTS, right_result

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def library():
    path = library_path()
    if not path.exists():
        try:
            build()
        except FileNotFoundError as error:
            pytest.skip(f"{path.name} was not built (python -m tests.gpu.zoo), and {error}")
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_twin(library, kernel):
    pointer = ctypes.POINTER(ctypes.c_float)
    result = np.full(RESULTS, np.nan, np.float32)
    status = library.llava_st_run_zoo(kernel.encode(), INPUT.ctypes.data_as(pointer), result.ctypes.data_as(pointer))
    assert status == 0, f"CUDA error {status}"
    expected = right_result(kernel)
    np.testing.assert_array_equal(result[: len(expected)], expected)
