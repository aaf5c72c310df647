"""The ops: public functions, and what torch needs to know about each (fakes, autograd, autocast, vmap)."""

from .coordinate_cross_entropy import coordinate_cross_entropy
from .lape_add import lape_add, lape_add_, lape_add_packed
from .lape_mlp import lape_mlp
from .lape_scatter import lape_scatter
from .neighboring_token_propagation import neighboring_token_propagation
from .normalized_region_attention import normalized_region_attention
from .point_to_region_attention import point_to_region_attention, point_to_region_attention_packed
from .region_centers import region_centers

__all__ = [
    "coordinate_cross_entropy",
    "lape_add",
    "lape_add_",
    "lape_add_packed",
    "lape_mlp",
    "lape_scatter",
    "neighboring_token_propagation",
    "normalized_region_attention",
    "point_to_region_attention",
    "point_to_region_attention_packed",
    "region_centers",
]
