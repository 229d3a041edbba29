"""Layouts that are made once and kept: for modules and attached models, eager and compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from openvsa.config import machine_fact
from openvsa.layout.keep import fakes_are_on
from openvsa.layout.tile import TileLayout, sides, whole

__all__ = ["kept_layout"]

_MOST = 64  # kept at a time: a layout of 100,000 tokens has index tensors of some megabytes


class _Shelf:
    """Holds each layout as an attribute. torch.compile reads attributes of a global object as they are at that time,
    and guards them; a layout made while it traces would become an output of the graph, and a dict it reads once."""


_SHELF = _Shelf()
_NAMES: dict[tuple[object, ...], str] = {}
_COUNT = itertools.count()


def kept_layout(
    grid: Iterable[int],
    tile: Iterable[int] | None,
    q_tiles: Iterable[int],
    prefix: int,
    suffix: int,
    device: torch.device,
) -> TileLayout:
    """The layout of a lattice in tiles of `tile` (None: those that fit best), its index tensors on `device`.

    Raises `ShapeError` as `TileLayout` does.
    """
    # Plain numbers: one key however they are given, and compiled code is for one lattice, also where torch.compile
    # takes sizes for symbols.
    numbers = (
        sides("grid", grid),
        None if tile is None else sides("tile", tile),
        whole("prefix", prefix, 0),
        whole("suffix", suffix, 0),
        sides("q_tiles", q_tiles) if q_tiles else (),
    )
    return getattr(_SHELF, _name(numbers, device))


@machine_fact
def _name(numbers: tuple[Any, ...], device: torch.device) -> str:
    key = numbers, device, fakes_are_on()  # with fakes on, nothing is copied to the device to keep
    if key not in _NAMES:
        grid, tile, *others = numbers
        layout = TileLayout.fit(grid, 64, *others) if tile is None else TileLayout(grid, tile, *others)
        name = f"layout_{next(_COUNT)}"
        setattr(_SHELF, name, layout.on(device))
        _NAMES[key] = name
        while len(_NAMES) > _MOST:
            delattr(_SHELF, _NAMES.pop(next(iter(_NAMES))))
    return _NAMES[key]
