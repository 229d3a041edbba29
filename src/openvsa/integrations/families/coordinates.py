"""The lattice in a table of token coordinates, for models that are given positions instead of sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Sequence

__all__ = ["sequence_of_coordinates"]


def sequence_of_coordinates(coords: Tensor, *, first: bool) -> Sequence:
    """The sequence that coordinates [B, 3, S] in the order (time, height, width) describe.

    A lattice is a stretch of tokens in raster order: width runs fastest, then height, then time. The longest stretch
    is the video, of equally long ones the `first` or else the last; tokens before and after it are conditioning.
    Coordinates on a GPU are copied to the host, which waits for it.

    Raises:
        UnsupportedError: the samples differ in their coordinates, or the longest stretch is no full lattice.
    """
    if coords.ndim != 3 or coords.shape[1] != 3 or not coords.shape[2]:
        raise UnsupportedError(f"expected token coordinates [batch, 3, tokens], got {list(coords.shape)}")
    coords = coords.detach().cpu()
    if not torch.equal(coords, coords[:1].expand_as(coords)):
        raise UnsupportedError("the samples of the batch differ in their token coordinates; run them one by one")
    time, height, width = coords[0].diff(dim=-1).sign().int().unbind(0)
    in_row = (time == 0) & (height == 0) & (width > 0)
    next_row = (time == 0) & (height > 0) & (width <= 0)
    next_frame = (time > 0) & (height <= 0) & (width <= 0)
    tokens = coords.shape[2]
    cuts = [0, *((~(in_row | next_row | next_frame)).nonzero().flatten() + 1).tolist(), tokens]
    begin, end = max(pairwise(cuts), key=lambda cut: (cut[1] - cut[0], -cut[0] if first else cut[0]))
    rows = _starts(next_row | next_frame, begin, end)
    frames = _starts(next_frame, begin, end)
    grid = (len(frames), len(rows) // len(frames), (end - begin) // len(rows))
    if rows != list(range(begin, end, grid[2])) or frames != list(range(begin, end, grid[1] * grid[2])):
        raise UnsupportedError(
            f"tokens {begin} to {end - 1} run in raster order, but their rows or frames differ in length, so they are "
            "no lattice; only videos whose frames all have one size can be sparse"
        )
    return Sequence(grid, prefix=begin, suffix=tokens - end)


def _starts(breaks: Tensor, begin: int, end: int) -> list[int]:
    """The tokens of [begin, end) at which something starts; breaks[i] is between token i and i + 1."""
    return [begin, *(breaks[begin : end - 1].nonzero().flatten() + begin + 1).tolist()]
