"""The ops in plain PyTorch: the definition of right, and the fallback where no kernel runs.

Imports nothing of the rest of the package. Every function works on any device and dtype, computes in the dtype of its
inputs, and differentiates (twice, and in forward mode) by PyTorch's own rules.
"""

from .point_to_region_attention import (
    point_to_region_attention,
    point_to_region_attention_backward,
    point_to_region_attention_packed,
    point_to_region_attention_packed_backward,
)
from .region_centers import region_centers

__all__ = [
    "point_to_region_attention",
    "point_to_region_attention_backward",
    "point_to_region_attention_packed",
    "point_to_region_attention_packed_backward",
    "region_centers",
]
