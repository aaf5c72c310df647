"""The ops in plain PyTorch: the definition of right, and the fallback where no kernel runs.

Imports nothing of the rest of the package. Every function works on any device and floating point dtype and
differentiates, twice and in forward mode. Attention computes in the dtype of its inputs, the rest in float32 or better.
"""

from .coordinate_loss import coordinate_cross_entropy, coordinate_losses, coordinate_losses_backward
from .lape import (
    interpolate_rows,
    lape_add,
    lape_add_backward,
    lape_add_packed,
    lape_add_packed_backward,
    lape_scatter,
    lape_scatter_backward,
    neighboring_token_propagation,
    propagate_to_neighbors,
    resize_table,
)
from .linear_lape_gelu import gelu_linear_gradient, linear_lape_gelu
from .normalized_region_attention import normalized_region_attention, normalized_region_attention_backward
from .point_to_region_attention import (
    point_to_region_attention,
    point_to_region_attention_backward,
    point_to_region_attention_packed,
    point_to_region_attention_packed_backward,
)
from .region_centers import region_centers

__all__ = [
    "coordinate_cross_entropy",
    "coordinate_losses",
    "coordinate_losses_backward",
    "gelu_linear_gradient",
    "interpolate_rows",
    "lape_add",
    "lape_add_backward",
    "lape_add_packed",
    "lape_add_packed_backward",
    "lape_scatter",
    "lape_scatter_backward",
    "linear_lape_gelu",
    "neighboring_token_propagation",
    "normalized_region_attention",
    "normalized_region_attention_backward",
    "point_to_region_attention",
    "point_to_region_attention_backward",
    "point_to_region_attention_packed",
    "point_to_region_attention_packed_backward",
    "propagate_to_neighbors",
    "region_centers",
    "resize_table",
]
