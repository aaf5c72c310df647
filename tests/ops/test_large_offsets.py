"""Strides of more than 2^31 elements. Apart from the other tests: poisoned results would touch all of that memory."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import point_to_region_attention
from tests.attention_cases import Case


def test_offsets_beyond_32_bits(on_backend):
    """Strides of more than 2^31 elements; only the pages that are touched take memory."""
    case = Case(2, (1, 3, 3), (1, 3, 3), 2, 64)
    query, key, value = case.inputs(torch.bfloat16, on_backend)
    far = 2**31 + 8
    try:
        memory = torch.empty(far + key[0].numel(), dtype=key.dtype, device=on_backend)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    apart = memory.as_strided(key.shape, (far, *key.stride()[1:]))
    with torch.no_grad():
        apart.copy_(key)
    output = point_to_region_attention(query, apart, value, case.region)
    assert torch.equal(output, point_to_region_attention(query, key, value, case.region))
