"""The selection rule of the released VSA weights: how many tiles, from which scores, rounded where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import BudgetError, ShapeError
from openvsa.layout import TileLayout
from openvsa.layout.tile import check_layout
from openvsa.plan import BlockPlan
from openvsa.plan.rank import rank_in_chunks
from openvsa.select.pool import pool_mean

__all__ = ["ReleasedVSA"]

Counted = Literal["tiles", "tokens"]


@dataclass(frozen=True)
class ReleasedVSA:
    """Video sparse attention as the authors of VSA run the weights they released, to the rounding.

    From our own rule (PooledTopK) it differs in three things: tile means, scores and the compressed branch are rounded
    to the dtype of q, so that several tiles often score alike (the lowest index wins); tiles are always 4 x 4 x 4; and
    the number of kept tiles follows the authors' formula in the authors' floating point. Source: FastVideo
    (github.com/hao-ai-lab/FastVideo), fastvideo-kernel/python/fastvideo_kernel/ops.py and
    fastvideo/attention/backends/video_sparse_attn.py, August 2026.

    Args:
        sparsity: the share of tiles left out, in [0, 1), as on the model's card: 0.8 for FastWan2.1-T2V-1.3B, 0.9 for
            the 14B models.
        counted: what the kept share is a share of. "tiles" counts every tile, also short ones at the border, as
            FastVideo does since July 2026 (its change 1517); "tokens" counts tokens / 64, as it did before and when
            the weights were trained. They differ on lattices that 4 does not divide: at sparsity 0.8 the lattice
            (21, 30, 52) keeps 125 tiles against 103.

    Raises:
        BudgetError: sparsity is outside [0, 1), or counted is neither of the two.
    """

    sparsity: float
    counted: Counted = "tiles"

    tile: ClassVar[tuple[int, ...]] = (4, 4, 4)

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity < 1:
            raise BudgetError(f"sparsity must be in [0, 1), got {self.sparsity!r}; 0 keeps every tile")
        if self.counted not in get_args(Counted):
            raise BudgetError(f"counted must be 'tiles' or 'tokens', got {self.counted!r}")

    @property
    def budget(self) -> Budget:
        """What is asked for, before it is counted on a lattice: the budget to give together with this selector."""
        return Budget(keep_ratio=1 - self.sparsity)

    def kept(self, layout: TileLayout) -> int:
        """The number of tiles that each query tile keeps on this lattice.

        Raises:
            ShapeError: the layout has text tokens, or another tile than 4 x 4 x 4.
        """
        if len(layout.grid) != 3 or layout.tile != TileLayout(layout.grid, self.tile).tile:
            raise ShapeError(
                f"the released VSA weights need a (T, H, W) lattice in tiles of {self.tile}, got grid={layout.grid} "
                f"with tile={layout.tile}"
            )
        if layout.prefix or layout.suffix or layout.q_blocks != layout.blocks:
            raise ShapeError(
                "the released VSA weights attend over video tokens alone, with query blocks of one tile, got a layout "
                f"with prefix={layout.prefix}, suffix={layout.suffix}, q_tiles={layout.q_tiles}"
            )
        tiles = layout.num_tiles
        whole = tiles if self.counted == "tiles" else layout.num_tokens / math.prod(self.tile)
        # Not Budget.blocks, which undoes the rounding error of this product.
        return max(1, min(math.ceil((1 - self.sparsity) * whole), tiles))

    def check(self, budget: Budget) -> None:
        """Refuse any budget but `budget`: this rule decides by itself how many tiles are kept.

        Raises:
            BudgetError: the budget is another.
        """
        if budget != self.budget:
            raise BudgetError(
                f"the sparsity of {self} decides how many tiles are kept; give {self.budget}, got {budget}"
            )

    def __call__(self, q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        """See Selector.

        Raises:
            BudgetError: the budget is not that of this sparsity.
            ShapeError: as in `kept`.
        """
        check_layout(layout)
        if not torch.compiler.is_compiling():  # a compiled forward may hold the numbers of a budget as variables
            self.check(budget)
        q_means, k_means = self.means(q.detach(), layout), self.means(k.detach(), layout)
        return self.plan(self.scores(q_means, k_means), layout)

    def means(self, x: Tensor, layout: TileLayout) -> Tensor:
        """Tile means of x [B, S, H, D] in block order: summed in fp32, [B, N, H, D] in the dtype of x."""
        return pool_mean(x, layout.blocks).to(x.dtype)

    def scores(self, q_means: Tensor, k_means: Tensor) -> Tensor:
        """[B, H, N, N] in the dtype of the means: rounded after the product, and again after the division by sqrt(D).
        Differentiable."""
        if q_means.shape != k_means.shape:
            raise ShapeError(
                "the released VSA weights have as many key heads as query heads, got tile means of shapes "
                f"{tuple(q_means.shape)} and {tuple(k_means.shape)}"
            )
        with torch.autocast(q_means.device.type, enabled=False):
            return (q_means.transpose(1, 2) @ k_means.permute(0, 2, 3, 1)) / q_means.shape[-1] ** 0.5

    def plan(self, scores: Tensor, layout: TileLayout) -> BlockPlan:
        """The plan that keeps the best scores [B, H, N, N], before softmax, ties to the lowest index."""
        batch, heads, tiles, _ = scores.shape
        counts, indices = rank_in_chunks(
            lambda start, stop: scores[:, :, start:stop], tiles, tiles, batch * heads, Budget(top_k=self.kept(layout))
        )
        return BlockPlan(counts, indices, layout.blocks, layout.blocks)
