"""Scores between blocks, ranked under a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import BudgetError, ShapeError

__all__ = ["rank"]


def rank(scores: Tensor, budget: Budget, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the key blocks of each query block: the best scores that the budget allows.

    Ties go to the lowest index and the result depends on nothing but the values, so that it is the same on every
    device and in every run. NaN ranks below every number. No gradient flows, and the host never waits.

    Args:
        scores: [..., NQ, NK], compared in fp32. For a top_p budget they are the logits whose softmax over NK is the
            estimated attention mass.
        budget: how many blocks to keep.
        forced: bool, broadcastable to scores: blocks to keep in any case. They count towards the budget, and must
            not be more than it in any row.

    Returns:
        kv_num_blocks int32 [..., NQ] and kv_indices int32 [..., NQ, K], ascending; entries past the count are 0.

    Raises:
        ShapeError: scores have fewer than 2 dimensions.
        BudgetError: keep_self is asked for and NQ differs from NK.
    """
    if scores.dim() < 2:
        raise ShapeError(f"scores must be [..., NQ, NK], got shape {tuple(scores.shape)}")
    num_q, num_kv = scores.shape[-2:]
    if budget.keep_self and num_q != num_kv:
        raise BudgetError(f"keep_self needs as many query blocks as key blocks, got {num_q} and {num_kv}")
    width = budget.blocks(num_kv)
    scores = scores.detach().float().nan_to_num(nan=float("-inf"))
    column = torch.arange(num_kv, device=scores.device)
    if budget.keep_first:
        first = column < budget.keep_first
        forced = first if forced is None else forced | first
    if budget.keep_self:
        own = torch.eye(num_kv, dtype=torch.bool, device=scores.device)
        forced = own if forced is None else forced | own

    keys = _ordered_keys(scores if forced is None else scores.masked_fill(forced, float("inf")), column)
    best = keys.topk(width, dim=-1).indices
    if budget.top_p in (None, 1):
        counts = torch.full(scores.shape[:-1], width, dtype=torch.int32, device=scores.device)
        return counts, best.sort(dim=-1).values.int()

    mass = scores.softmax(-1).nan_to_num(0.0).gather(-1, best)
    before = mass.cumsum(-1) - mass
    counts = (before < budget.top_p - 1e-6).sum(-1)
    counts = counts.clamp(min=min(budget.min_blocks, width), max=width)
    if forced is not None:
        counts = counts.maximum(forced.expand(scores.shape).sum(-1)).clamp(max=width)
    past = torch.arange(width, device=scores.device) >= counts[..., None]
    ascending = best.masked_fill(past, num_kv).sort(dim=-1).values
    return counts.int(), ascending.masked_fill(past, 0).int()


def _ordered_keys(scores: Tensor, column: Tensor) -> Tensor:
    """int64 keys that sort like the fp32 scores, with no two alike: of equal scores the lower column is greater."""
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) + (column.numel() - 1 - column)
