"""What the GPU tests share."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import backends, use_backend


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    """Forces each backend of a GPU in turn. What it can run depends on device and dtype alone, not on the op."""
    verdict = backends.can_run(request.param, "point_to_region_attention", "cuda", torch.bfloat16)
    if not verdict.ok:
        pytest.skip(verdict.reason)
    with use_backend(request.param):
        yield request.param
