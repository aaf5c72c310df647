"""Modules made of the ops."""

from .lape import CoordinateTokens, LanguageAlignedPositionalEmbedding
from .packers import PointToRegionPacker, SpatialTemporalPacker
from .visual_tokenizer import FrozenVisualTokenizer, VisualTokenizer

__all__ = [
    "CoordinateTokens",
    "FrozenVisualTokenizer",
    "LanguageAlignedPositionalEmbedding",
    "PointToRegionPacker",
    "SpatialTemporalPacker",
    "VisualTokenizer",
]
