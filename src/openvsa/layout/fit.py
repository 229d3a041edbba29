"""The best tile for a lattice."""

from __future__ import annotations

import math
from collections.abc import Iterator

__all__ = ["MAX_ASPECT", "best_tile"]

MAX_ASPECT = 4


def best_tile(grid: tuple[int, ...], max_block: int) -> tuple[int, ...]:
    """The tile of at most `max_block` tokens that cuts `grid` into the fewest blocks (see TileLayout.fit)."""

    def rank(tile: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        blocks = math.prod(-(-g // t) for g, t in zip(grid, tile, strict=True))
        surface = math.prod(tile) * sum(1 / t for t in tile)
        return blocks, round(surface, 9), tile

    return min(_tiles(grid, max_block), key=rank)


def _tiles(grid: tuple[int, ...], max_block: int) -> Iterator[tuple[int, ...]]:
    """Tiles whose sides are within MAX_ASPECT of each other, sides that span the grid excepted."""

    def extend(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        axis = len(tile)
        if axis == len(grid):
            free = [t for t, g in zip(tile, grid, strict=True) if t < g]
            if not free or max(tile) <= MAX_ASPECT * min(free):
                yield tile
            return
        for side in range(1, min(grid[axis], max_block // math.prod(tile)) + 1):
            yield from extend((*tile, side))

    yield from extend(())
