"""Triton kernels: what runs on a GPU when the CUDA library was not built.

Importing this package does not import Triton, which need not be installed; the first call of a function does.
"""

from .addition import lape_add, lape_add_, lape_add_backward, lape_add_packed, lape_add_packed_backward
from .coordinate_loss import coordinate_cross_entropy, coordinate_cross_entropy_backward
from .lape_mlp import gelu_linear_gradient, linear_lape_gelu
from .normalized_region_attention import normalized_region_attention, normalized_region_attention_backward
from .point_to_region_attention import backward, forward, packed_backward, packed_forward
from .propagation import propagate_to_neighbors
from .scattering import lape_scatter, lape_scatter_backward

__all__ = [
    "backward",
    "coordinate_cross_entropy",
    "coordinate_cross_entropy_backward",
    "forward",
    "gelu_linear_gradient",
    "lape_add",
    "lape_add_",
    "lape_add_backward",
    "lape_add_packed",
    "lape_add_packed_backward",
    "lape_scatter",
    "lape_scatter_backward",
    "linear_lape_gelu",
    "normalized_region_attention",
    "normalized_region_attention_backward",
    "packed_backward",
    "packed_forward",
    "propagate_to_neighbors",
]
