"""Geometry: which tokens form a block, and in which order."""

from openvsa.layout.offsets import BlockOffsets
from openvsa.layout.tile import TileLayout

__all__ = ["BlockOffsets", "TileLayout"]
