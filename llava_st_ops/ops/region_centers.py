"""The centre of each region: the seed of a packer's queries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from . import checks


def region_centers(x: Tensor, region: Sequence[int]) -> Tensor:
    """The sample in the middle of each region of a grid, by linear interpolation.

    Args:
        x: `[B, T, H, W, C]`, of any floating point dtype.
        region: tokens per region along time, height and width.

    Returns:
        `[B, T', H', W', C]` with `T' = ceil(T / rt)` and so on. It is the centre sample where a region has an odd
        number of samples along an axis, the mean of the middle two where it has an even number. Where the region
        divides the grid this is what `torch.nn.functional.interpolate(..., align_corners=False)` gives. A partial
        region at the edge has its own centre by the same rule. May share memory with `x`. Means are taken in float32 or
        better.

    Raises:
        ValueError: `x` or `region` of the wrong form.
        TypeError: `x` is not of a floating point dtype.

    Plain PyTorch on every device: the ordinary case, odd sizes without partial regions, is a view.

    Source: the queries of TokenPacker (arXiv:2407.02392) and LLaVA-ST (arXiv:2501.08282).
    """
    checks.check_region("region_centers", region)
    checks.check_rank("region_centers", "x", x, 5, "[B, T, H, W, C]")
    checks.check_floating("region_centers", "x", x)
    return reference.region_centers(x, region)
