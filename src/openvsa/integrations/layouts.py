"""The layouts that attached models use, kept for later forwards and for compiled code."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from typing import Any

import torch

from openvsa.config import machine_fact
from openvsa.layout import TileLayout

__all__ = ["kept_layout"]

_MOST = 64  # kept at a time: a layout of 100,000 tokens has index tensors of some megabytes


class _Shelf:
    """Holds each layout as an attribute. torch.compile reads attributes of a global object as they are at that time,
    and guards them; a layout made while it traces would become an output of the graph, and a dict it reads once."""


_SHELF = _Shelf()
_NAMES: OrderedDict[tuple[object, ...], str] = OrderedDict()
_COUNT = itertools.count()


def kept_layout(
    grid: tuple[int, ...],
    tile: tuple[int, ...] | None,
    q_tiles: tuple[int, ...],
    prefix: int,
    suffix: int,
    device: torch.device,
) -> TileLayout:
    """The layout of a lattice in tiles of `tile` (None: those that fit best), its index tensors on `device`."""
    # Compiled code is for one lattice, also where torch.compile takes sizes for symbols.
    grid, q_tiles = (tuple(operator.index(side) for side in sides) for sides in (grid, q_tiles))
    tile = None if tile is None else tuple(operator.index(side) for side in tile)
    return getattr(_SHELF, _name((grid, tile, q_tiles, operator.index(prefix), operator.index(suffix)), device))


@machine_fact
def _name(numbers: tuple[Any, ...], device: torch.device) -> str:
    key = numbers, device
    if key not in _NAMES:
        grid, tile, q_tiles, prefix, suffix = numbers
        if tile is None:
            layout = TileLayout.fit(grid, prefix=prefix, suffix=suffix, q_tiles=q_tiles)
        else:
            layout = TileLayout(grid, tile, prefix, suffix, q_tiles)
        name = f"layout_{next(_COUNT)}"
        setattr(_SHELF, name, layout.on(device))
        _NAMES[key] = name
        while len(_NAMES) > _MOST:
            delattr(_SHELF, _NAMES.popitem(last=False)[1])
    return _NAMES[key]
