"""Triton kernels: what runs on a GPU when the CUDA library was not built.

Importing this package does not import Triton, which need not be installed; the first call of a function does.
"""

from .point_to_region_attention import backward, forward, packed_backward, packed_forward
from .propagation import propagate_to_neighbors

__all__ = ["backward", "forward", "packed_backward", "packed_forward", "propagate_to_neighbors"]
