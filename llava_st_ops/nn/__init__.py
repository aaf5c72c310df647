"""Modules made of the ops."""

from .packers import PointToRegionPacker, SpatialTemporalPacker

__all__ = ["PointToRegionPacker", "SpatialTemporalPacker"]
