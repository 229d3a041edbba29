"""The selection rule of VSA: mean-pooled queries against mean-pooled keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.layout import TileLayout
from openvsa.layout.device import has_kernels
from openvsa.layout.reorder import two_means
from openvsa.layout.tile import check_layout
from openvsa.plan import BlockPlan
from openvsa.plan.rank import rank_in_chunks
from openvsa.select.pool import pool_mean
from openvsa.torch_op import torch_op

__all__ = ["PooledTopK", "pooled_scores"]


def pooled_scores(q_pooled: Tensor, k_pooled: Tensor, scale: float) -> Tensor:
    """Scores between blocks, [B, H, NQ, NK], from block means q_pooled [B, NQ, H, D] and k_pooled [B, NK, Hkv, D],
    in their dtype also under autocast. Differentiable.

    On a GPU fp32 scores have the accuracy of fp32, whatever precision the program allows for its matrix products.
    """
    if q_pooled.dtype == torch.float32 and has_kernels(q_pooled, k_pooled):
        return _block_scores(q_pooled, k_pooled, scale)
    batch, num_q, heads, _ = q_pooled.shape
    scores = product(by_kv_head(q_pooled, k_pooled.shape[2]), k_pooled.permute(0, 2, 3, 1))
    return scores.reshape(batch, heads, num_q, k_pooled.shape[1]) * scale


def by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Rows of the query heads that share a key head, one after another: x [B, N, H, D] to [B, Hkv, H / Hkv * N, D]."""
    batch, rows, heads, dim = x.shape
    return x.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in the dtype of its operands also under autocast, and so is its gradient. a and b have the
    same leading dimensions."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_meta or not torch.is_autocast_enabled(a.device.type):  # meta tensors know no autocast
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _Product(torch.autograd.Function):
    # One method and not two: with setup_context, torch looks at the signature in every call, for 20 microseconds.
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # This may run inside an autocast region of its own.
        a, b = ctx.saved_tensors
        return product(grads[0], b.mT), product(a.mT, grads[0])


def _block_scores_kernel(q_pooled: Tensor, k_pooled: Tensor, scale: float) -> Tensor:
    from openvsa.select import kernels

    scores = _empty_scores(q_pooled, k_pooled, scale)
    kernels.block_scores(q_pooled, k_pooled, scale, scores)
    return scores


def _empty_scores(q_pooled: Tensor, k_pooled: Tensor, scale: float) -> Tensor:
    """Room for scores, in rows of a multiple of 64 bytes: kernels then read and write several at a time."""
    batch, num_q, heads, _ = q_pooled.shape
    num_kv = k_pooled.shape[1]
    row = -(-num_kv // 16) * 16
    return q_pooled.new_empty_strided((batch, heads, num_q, num_kv), (heads * num_q * row, num_q * row, row, 1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q_pooled, k_pooled, ctx.scale = inputs
    ctx.save_for_backward(q_pooled, k_pooled)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    q_pooled, k_pooled = ctx.saved_tensors
    batch, num_q, heads, dim = q_pooled.shape
    kv_heads = k_pooled.shape[2]
    grad = grad.reshape(batch, kv_heads, heads // kv_heads * num_q, k_pooled.shape[1])
    grad_q = product(grad, k_pooled.transpose(1, 2)).reshape(batch, heads, num_q, dim).transpose(1, 2)
    grad_k = product(grad.mT, by_kv_head(q_pooled, kv_heads)).transpose(1, 2)
    return grad_q * ctx.scale, grad_k * ctx.scale, None


_block_scores = torch_op("block_scores", _block_scores_kernel, _empty_scores, save=_save, differentiate=_differentiate)


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
        check_layout(layout)
        q, k = q.detach(), k.detach()
        if layout.q_blocks is layout.blocks and has_kernels(q, k):
            layout.check("q", q.shape[1])
            layout.check("k", k.shape[1])
            found = two_means(q, k, layout.blocks.on(q.device), layout.blocks.max_len)
            q_pooled, k_pooled = (x.transpose(1, 2) for x in found)
        else:
            q_pooled, k_pooled = pool_mean(q, layout.q_blocks), pool_mean(k, layout.blocks)
        return self.plan(q_pooled[:, layout.q_tile_blocks], k_pooled[:, layout.tile_blocks], layout, budget)

    def plan(
        self, q_pooled: Tensor, k_pooled: Tensor, layout: TileLayout, budget: Budget, scores: Tensor | None = None
    ) -> BlockPlan:
        """The plan from tile means that the caller has already: q_pooled [B, NQ, H, D] of the query
        blocks that are tiles, k_pooled [B, NK, Hkv, D] of the tiles; and their `pooled_scores` with the scale of this
        rule, if they are at hand too."""
        scale = 1 / math.sqrt(q_pooled.shape[-1]) if self.scale is None else self.scale
        q_pooled, k_pooled = q_pooled.detach(), k_pooled.detach()
        batch, num_q, heads, _ = q_pooled.shape

        def of_rows(start: int, stop: int) -> Tensor:
            if scores is None:
                found = pooled_scores(q_pooled[:, start:stop], k_pooled, scale)
            else:
                found = scores.detach()[:, :, start:stop]
            if self.length_bias:
                found = found + layout.blocks.lens_on(found.device)[layout.tile_blocks].log()
            return found

        counts, indices = rank_in_chunks(of_rows, num_q, k_pooled.shape[1], batch * heads, budget)
        lists = _with_text(counts, indices, layout, alike=budget.top_p in (None, 1))
        return BlockPlan(*lists, layout.q_blocks, layout.blocks)


def _with_text(counts: Tensor, indices: Tensor, layout: TileLayout, *, alike: bool) -> tuple[Tensor, Tensor]:
    """Lists over tiles to lists over all blocks: text blocks are read by every block and read every block.

    `alike` says that every row keeps as many tiles as the lists are wide, which takes the host fewer launches.
    """
    if not layout.text_blocks:
        return counts, indices
    tiles, rows, num_blocks = layout.tile_blocks, layout.q_tile_blocks, layout.num_blocks
    batch, heads, _, width = indices.shape
    first, text, after = tiles.start, num_blocks - layout.num_tiles, num_blocks - tiles.stop
    every = torch.arange(num_blocks, dtype=torch.int32, device=indices.device)
    # Of each row of text all of it stays, of the others the text before the tiles, and what is past their counts.
    lists = every.expand(batch, heads, layout.q_blocks.num_blocks, -1).clone(memory_format=torch.contiguous_format)
    totals = counts.new_full(lists.shape[:3], num_blocks)
    kept = lists[:, :, rows]
    kept[..., first : first + width] = indices + first if first else indices
    if alike:
        kept[..., first + width : first + width + after] = every[tiles.stop :]
        totals[:, :, rows] = width + text
    else:  # ascending: the text after the tiles follows the last that a row keeps
        place = counts[..., None] + torch.arange(first, first + after, device=counts.device)
        kept.scatter_(-1, place, every[tiles.stop :].expand(place.shape))
        totals[:, :, rows] = counts + text
    return totals, lists
