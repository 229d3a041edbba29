"""What released VSA weights mean, stated in plain torch.

This is the authors' form: every tile padded to 64 slots, dense scores with a mask, choice by sorting. It shares no code
with ours.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Contract", "contract", "slots_of"]


class Contract(NamedTuple):
    out: Tensor  # [B, S, H, D], raster order
    kept: Tensor  # bool [B, H, N, N]
    compressed: Tensor  # [B, S, H, D], before the branch weight


def contract(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, grid: tuple[int, int, int], kept_tiles: int) -> Contract:
    """What the authors' code computes, for raster q, k, v and weight [B, S, H, D]."""
    tiles, lens = slots_of(grid)
    batch, _, heads, dim = q.shape
    num = len(lens)
    filled = torch.arange(64) < lens[:, None]

    def padded(x: Tensor) -> Tensor:
        buffer = torch.zeros(batch, heads, num, 64, dim, dtype=x.dtype)
        for tile, tokens in enumerate(tiles):
            buffer[:, :, tile, : len(tokens)] = x[:, tokens].transpose(1, 2)
        return buffer

    q, k, v, weight = padded(q), padded(k), padded(v), padded(weight)
    q_c, k_c, v_c = ((x.float().sum(3) / lens[:, None]).to(x.dtype) for x in (q, k, v))
    scores = torch.matmul(q_c, k_c.transpose(-2, -1)) / math.sqrt(dim)
    compressed = torch.matmul(torch.softmax(scores, -1), v_c)

    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row in product(*map(range, scores.shape[:3])):
        values = scores[row].tolist()
        best = sorted(range(num), key=lambda tile: (-values[tile], tile))[:kept_tiles]
        kept[row][best] = True

    wide = q.flatten(2, 3).float() @ k.flatten(2, 3).float().transpose(-2, -1) / math.sqrt(dim)
    readable = kept.repeat_interleave(64, 2).repeat_interleave(64, 3) & filled.flatten()
    sparse = wide.masked_fill(~readable, -math.inf).softmax(-1) @ v.flatten(2, 3).float()
    sparse = sparse.to(q.dtype).unflatten(2, (num, 64))
    compressed = compressed[:, :, :, None].expand_as(sparse)
    out = compressed * weight + sparse

    def raster(x: Tensor) -> Tensor:
        packed = torch.cat([x[:, :, tile, : len(tokens)] for tile, tokens in enumerate(tiles)], 2)
        return packed[:, :, torch.tensor([token for tokens in tiles for token in tokens]).argsort()].transpose(1, 2)

    return Contract(raster(out), kept, raster(compressed))


def slots_of(grid: tuple[int, int, int]) -> tuple[list[list[int]], Tensor]:
    """The raster indices of the tokens of each 4 x 4 x 4 tile, and how many there are."""
    t, h, w = grid
    tiles = [
        [
            (a * h + b) * w + c
            for a in range(i, min(i + 4, t))
            for b in range(j, min(j + 4, h))
            for c in range(k, min(k + 4, w))
        ]
        for i in range(0, t, 4)
        for j in range(0, h, 4)
        for k in range(0, w, 4)
    ]
    return tiles, torch.tensor([len(tile) for tile in tiles])
