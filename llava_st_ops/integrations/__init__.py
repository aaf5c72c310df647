"""Models of other packages, accelerated in place (docs/integrations.md)."""

from .llava_st import accelerate_llava_st
from .oryx import accelerate_oryx
from .replacement import Report, restore
from .token_packer import accelerate_token_packer
from .vision_sampler import accelerate_vision_sampler

__all__ = [
    "Report",
    "accelerate_llava_st",
    "accelerate_oryx",
    "accelerate_token_packer",
    "accelerate_vision_sampler",
    "restore",
]
