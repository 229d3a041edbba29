"""The selection rule of VSA: mean-pooled queries against mean-pooled keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.layout import BlockOffsets, TileLayout
from openvsa.plan import BlockPlan
from openvsa.select.pool import pool_mean

__all__ = ["PooledTopK", "pooled_scores"]


def pooled_scores(q_pooled: Tensor, k_pooled: Tensor, scale: float) -> Tensor:
    """Scores between blocks, [B, H, NQ, NK], from block means q_pooled [B, NQ, H, D] and k_pooled [B, NK, Hkv, D],
    in their dtype also under autocast."""
    groups = q_pooled.shape[2] // k_pooled.shape[2]
    q_pooled = q_pooled.unflatten(2, (k_pooled.shape[2], groups))
    with torch.autocast(q_pooled.device.type, enabled=False):
        return torch.einsum("bqkgd,bnkd->bkgqn", q_pooled, k_pooled).flatten(1, 2) * scale


@dataclass(frozen=True)
class PooledTopK:
    """Keep the key tiles whose mean key scores highest against the query tile's mean query.

    VSA (arXiv 2505.13389, section 2.2), with scores in fp32 and ties to the lowest index. Only tiles of the lattice
    compete for the budget: text blocks are read by every block and read every block.

    Args:
        scale: multiplies the scores, None means 1 / sqrt(D). It matters for top_p budgets only.
        length_bias: add the log of each key tile's token count to its score, so that a short border tile counts
            for the attention mass it can hold (not in the paper, which treats all tiles alike).
    """

    scale: float | None = None
    length_bias: bool = False

    def __call__(self, q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        """See Selector."""
        tiles = layout.tile_blocks
        q_pooled, k_pooled = (pool_mean(x.detach(), layout.blocks)[:, tiles] for x in (q, k))
        return self.plan(q_pooled, k_pooled, layout, budget)

    def plan(self, q_pooled: Tensor, k_pooled: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        """The plan from tile means that the caller has already: [B, tiles, H, D] and [B, tiles, Hkv, D]."""
        scale = 1 / math.sqrt(q_pooled.shape[-1]) if self.scale is None else self.scale
        scores = pooled_scores(q_pooled, k_pooled, scale)
        if self.length_bias:
            scores = scores + layout.blocks.lens_on(scores.device)[layout.tile_blocks].log()
        return _with_text(scores, layout, budget)


def _with_text(scores: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
    if not layout.text_blocks:
        return BlockPlan.from_scores(scores, budget, layout.blocks, layout.blocks)
    tiles, blocks = layout.tile_blocks, layout.blocks
    tile_lens = BlockOffsets(blocks.lens[tiles])
    tile_plan = BlockPlan.from_scores(scores, budget, tile_lens, tile_lens)
    mask = torch.ones(*scores.shape[:2], blocks.num_blocks, blocks.num_blocks, dtype=torch.bool, device=scores.device)
    mask[..., tiles, tiles] = tile_plan.block_mask()
    return BlockPlan.from_block_mask(mask, blocks, blocks)
