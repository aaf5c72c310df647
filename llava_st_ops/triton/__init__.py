"""Triton kernels: what runs on a GPU when the CUDA library was not built.

Importing this package does not import Triton, which need not be installed; the first call of a function does.
"""

from .addition import lape_add, lape_add_, lape_add_backward, lape_add_packed, lape_add_packed_backward
from .coordinate_loss import coordinate_cross_entropy, coordinate_cross_entropy_backward
from .point_to_region_attention import backward, forward, packed_backward, packed_forward
from .propagation import propagate_to_neighbors
from .scattering import lape_scatter, lape_scatter_backward

__all__ = [
    "backward",
    "coordinate_cross_entropy",
    "coordinate_cross_entropy_backward",
    "forward",
    "lape_add",
    "lape_add_",
    "lape_add_backward",
    "lape_add_packed",
    "lape_add_packed_backward",
    "lape_scatter",
    "lape_scatter_backward",
    "packed_backward",
    "packed_forward",
    "propagate_to_neighbors",
]
