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
    """Tiles whose sides are within MAX_ASPECT of each other, sides that span the grid excepted; of these, all that can
    be the best.

    A side that can be shorter and still cuts its axis into as many parts makes a smaller surface, so the best tile has
    none, but for sides that MAX_ASPECT keeps from being shorter.
    """
    # Every ceil(g / parts): where there are more than sqrt(g) parts, the side is at most sqrt(g).
    shortest = [{size for n in range(1, math.isqrt(g) + 2) for size in (n, -(-g // n)) if size <= g} for g in grid]
    kept_long = {-(-side // MAX_ASPECT) for sides in shortest for side in sides}
    candidates = [
        sorted(sides | {side for side in kept_long if side < g}) for sides, g in zip(shortest, grid, strict=True)
    ]

    def extend(tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        axis = len(tile)
        if axis == len(grid):
            free = [t for t, g in zip(tile, grid, strict=True) if t < g]
            if not free or max(tile) <= MAX_ASPECT * min(free):
                yield tile
            return
        room = max_block // math.prod(tile)
        for side in candidates[axis]:
            if side > room:
                break
            yield from extend((*tile, side))

    yield from extend(())
