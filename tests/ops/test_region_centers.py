"""The seeds of the packers' queries."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from llava_st_ops import region_centers


def interpolated(x, region):
    """`[B, T, H, W, C]` by torch's linear interpolation, to the size that the region gives."""
    size = [extent // step for extent, step in zip(x.shape[1:4], region, strict=True)]
    return interpolate(x.movedim(-1, 1), size=size, mode="trilinear", align_corners=False).movedim(1, -1)


@pytest.mark.parametrize("region", [(1, 3, 3), (5, 1, 1), (5, 3, 3), (2, 2, 2), (1, 4, 2), (1, 1, 1)])
def test_equals_interpolation_where_the_region_divides_the_grid(region):
    x = torch.randn(2, 2 * region[0], 3 * region[1], 2 * region[2], 5, dtype=torch.float64)
    torch.testing.assert_close(region_centers(x, region), interpolated(x, region), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_factors_pick_the_centre_sample_to_the_bit(dtype):
    x = torch.randn(1, 10, 27, 27, 4).to(dtype)
    assert torch.equal(region_centers(x, (1, 3, 3)), x[:, :, 1::3, 1::3])
    assert torch.equal(region_centers(x, (5, 1, 1)), x[:, 2::5])


def test_even_factors_in_low_precision_round_once():
    x = torch.randn(1, 2, 4, 4, 8).bfloat16()
    expected = interpolated(x.float(), (2, 2, 2)).bfloat16()
    assert torch.equal(region_centers(x, (2, 2, 2)), expected)


def test_partial_regions_have_their_own_centres():
    x = torch.arange(7.0).reshape(1, 7, 1, 1, 1)
    assert region_centers(x, (3, 1, 1)).flatten().tolist() == [1, 4, 6]  # the last region holds one sample
    assert region_centers(x, (5, 1, 1)).flatten().tolist() == [2, 5.5]  # the last region holds two
    assert region_centers(x, (4, 1, 1)).flatten().tolist() == [1.5, 5]
    assert region_centers(x, (9, 1, 1)).flatten().tolist() == [3]


def test_gradients():
    x = torch.randn(1, 5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: region_centers(x, (2, 3, 2)), x)


def test_empty():
    assert region_centers(torch.randn(0, 5, 4, 3, 2), (2, 3, 2)).shape == (0, 3, 2, 2, 2)
    assert region_centers(torch.randn(1, 0, 4, 3, 2), (2, 3, 2)).shape == (1, 0, 2, 2, 2)
