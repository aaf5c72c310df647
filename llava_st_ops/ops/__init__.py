"""The ops: public functions, and what torch needs to know about each (fakes, autograd, autocast, vmap)."""

from .neighboring_token_propagation import neighboring_token_propagation
from .point_to_region_attention import point_to_region_attention, point_to_region_attention_packed
from .region_centers import region_centers

__all__ = [
    "neighboring_token_propagation",
    "point_to_region_attention",
    "point_to_region_attention_packed",
    "region_centers",
]
