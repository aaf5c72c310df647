"""Kernels for the two ideas of LLaVA-ST, point-to-region attention and language-aligned positions, as torch ops."""

from . import nn, reference
from .backends import BackendError, use_backend
from .ops import (
    coordinate_cross_entropy,
    lape_add,
    lape_add_,
    lape_add_packed,
    lape_mlp,
    lape_scatter,
    neighboring_token_propagation,
    normalized_region_attention,
    point_to_region_attention,
    point_to_region_attention_packed,
    region_centers,
)
from .version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "coordinate_cross_entropy",
    "lape_add",
    "lape_add_",
    "lape_add_packed",
    "lape_mlp",
    "lape_scatter",
    "neighboring_token_propagation",
    "nn",
    "normalized_region_attention",
    "point_to_region_attention",
    "point_to_region_attention_packed",
    "reference",
    "region_centers",
    "use_backend",
]
