"""Where a total density is spent best: from measured curves of error against density to a budget table."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openvsa.errors import BudgetError

__all__ = ["Curve", "allocate", "between", "convex_hull"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """What a head loses at each density, in any unit that adds up over heads.

    points: (density in (0, 1], loss) with ascending densities; the last one is at density 1, where nothing is lost.
    """

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        densities = [density for density, _ in self.points]
        if not densities or sorted(set(densities)) != densities or densities[0] <= 0 or densities[-1] != 1:
            raise BudgetError(f"a curve needs ascending densities in (0, 1], the last of them 1, got {densities}")


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points with ascending densities: where a curve is not convex, a mixture of two of its
    points would do better than the one between them."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def allocate(curves: Mapping[str, Sequence[Curve]], density: float, num_blocks: int) -> dict[str, tuple[float, ...]]:
    """The densities that lose least at a given mean density, in whole blocks.

    Every head begins with the blocks that its first point stands for; then one block at a time goes to the head that
    it saves most, measured on the convex hull of its curve. On convex curves that add up, no other division of the
    blocks loses less.

    Args:
        curves: layer -> one curve for each of its heads.
        density: the mean over all heads; of N = num_blocks, each head would keep ceil(density * N) of them, and
            exactly as many are spent in total.
        num_blocks: N, tiles of the lattice.

    Returns:
        layer -> one density for each of its heads, a whole number of blocks over N.

    Raises:
        BudgetError: the density is out of range, or less than what every head begins with.
    """
    if not 0 < density <= 1:
        raise BudgetError(f"density must be in (0, 1], got {density}")
    heads = [(layer, head) for layer, of_layer in curves.items() for head in range(len(of_layer))]
    spend = math.ceil(density * num_blocks - 1e-9) * len(heads)
    losses, kept = {}, {}
    for layer, head in heads:
        points = curves[layer][head].points
        kept[layer, head] = max(1, math.ceil(points[0][0] * num_blocks - 1e-9))
        losses[layer, head] = _by_block(convex_hull(points), num_blocks)
    spend -= sum(kept.values())
    if spend < 0:
        raise BudgetError(
            f"density {density} of {num_blocks} blocks is below the first measured density; measure the curves from a "
            "lower density on"
        )

    def gain(at: tuple[str, int]) -> float:
        loss, blocks = losses[at], kept[at]
        return loss[blocks] - loss[blocks + 1]

    # Of equal gains the first head in order is served first, so that the table is the same in every run.
    waiting = [(-gain(at), place, at) for place, at in enumerate(heads) if kept[at] < num_blocks]
    heapq.heapify(waiting)
    while spend and waiting:
        _, place, at = heapq.heappop(waiting)
        kept[at] += 1
        spend -= 1
        if kept[at] < num_blocks:
            heapq.heappush(waiting, (-gain(at), place, at))
    return {
        layer: tuple(kept[layer, head] / num_blocks for head in range(len(of_layer)))
        for layer, of_layer in curves.items()
    }


def between(
    start: Mapping[str, tuple[float, ...]], end: Mapping[str, tuple[float, ...]], share: float, num_blocks: int
) -> dict[str, tuple[float, ...]]:
    """Densities on the way from one table to another of the same total, in whole blocks and of that total."""
    places = [(layer, head) for layer, heads in start.items() for head in range(len(heads))]
    wanted = [num_blocks * ((1 - share) * start[at][head] + share * end[at][head]) for at, head in places]
    kept = [math.floor(blocks + 1e-9) for blocks in wanted]
    missing = round(sum(wanted)) - sum(kept)
    # The blocks lost in rounding down go to those who lost most; of equals to the first.
    for place in sorted(range(len(places)), key=lambda place: kept[place] - wanted[place])[:missing]:
        kept[place] += 1
    found: dict[str, tuple[float, ...]] = {}
    for (layer, _), blocks in zip(places, kept, strict=True):
        found[layer] = (*found.get(layer, ()), blocks / num_blocks)
    return found


def _by_block(hull: list[Point], num_blocks: int) -> list[float]:
    """The loss at 0, 1, ..., N blocks, on straight lines between the points of a hull; before the first, on its first
    line."""
    if len(hull) == 1:
        return [hull[0][1]] * (num_blocks + 1)
    losses, segment = [], 0
    for blocks in range(num_blocks + 1):
        density = blocks / num_blocks
        while segment < len(hull) - 2 and density > hull[segment + 1][0]:
            segment += 1
        (x0, y0), (x1, y1) = hull[segment : segment + 2]
        losses.append(y0 + (y1 - y0) * (density - x0) / (x1 - x0))
    return losses
