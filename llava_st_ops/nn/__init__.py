"""Modules made of the ops."""

from .lape import CoordinateTokens, LanguageAlignedPositionalEmbedding
from .packers import PointToRegionPacker, SpatialTemporalPacker

__all__ = [
    "CoordinateTokens",
    "LanguageAlignedPositionalEmbedding",
    "PointToRegionPacker",
    "SpatialTemporalPacker",
]
