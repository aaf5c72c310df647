"""The Triton kernel of propagate_to_neighbors: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import reference
from tests.tolerance import assert_accurate

# Triton's interpreter is wrong in bfloat16 without saying so.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(100, 16), (1, 1), (5, 200), (33, 129), (0, 4), (4, 0)], ids=str)
def test_matches_reference(launchers, device, shape, dtype):
    module = launchers("propagation")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    exact = reference.propagate_to_neighbors(x.double())
    assert_accurate(module.propagate_to_neighbors(x), exact, reference.propagate_to_neighbors(x))


def test_strided(launchers, device):
    module = launchers("propagation")
    whole = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(device)
    for x in (whole[::2, 1:7], whole.T, whole[:1].expand(9, 24)):
        exact = reference.propagate_to_neighbors(x.double())
        assert_accurate(module.propagate_to_neighbors(x), exact, reference.propagate_to_neighbors(x))
