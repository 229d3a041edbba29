"""Scores between blocks, ranked under a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import BudgetError, ShapeError
from openvsa.layout.device import kernels_on
from openvsa.torch_op import torch_op

__all__ = ["MAX_SCORES", "rank", "rank_in_chunks", "row_chunks"]

# Scores that exist at a time where they are made chunk by chunk: 256 MiB of fp32.
MAX_SCORES = 1 << 26

# The longest row that the kernel ranks; longer ones are sorted.
MAX_KERNEL_BLOCKS = 16384


def rank(scores: Tensor, budget: Budget, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the key blocks of each query block: the best scores that the budget allows.

    Ties go to the lowest index and the result depends on nothing but the values, so that it is the same on every
    device and in every run. NaN ranks below every number. No gradient flows, and the host never waits.

    On a GPU, rows of up to 16384 scores are ranked by a kernel that finds the threshold by bisection, without sorting;
    top_p budgets and longer rows are sorted.

    Args:
        scores: [..., NQ, NK], compared in fp32. For a top_p budget they are the logits whose softmax over NK is the
            estimated attention mass.
        budget: how many blocks to keep.
        forced: bool, broadcastable to scores: blocks to keep in any case. They count towards the budget, and must
            not be more than it in any row.

    Returns:
        kv_num_blocks int32 [..., NQ] and kv_indices int32 [..., NQ, K], ascending; entries past the count are 0.

    Raises:
        ShapeError: scores have fewer than 2 dimensions, or forced does not fit them.
        BudgetError: budget is something else, or keep_self is asked for and NQ differs from NK.
    """
    if scores.dim() < 2:
        raise ShapeError(f"scores must be [..., NQ, NK], got shape {tuple(scores.shape)}")
    num_q, num_kv = scores.shape[-2:]
    _check_budget(budget, num_q, num_kv)
    if forced is not None and not (forced.dtype == torch.bool and _expands(forced.shape, scores.shape)):
        raise ShapeError(
            f"forced must be bool and broadcastable to the scores {tuple(scores.shape)}, got {forced.dtype} of shape "
            f"{tuple(forced.shape)}"
        )
    return _rank(scores, budget, forced, 0)


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in pairs)


def row_chunks(num_q: int, scores_per_row: int) -> list[tuple[int, int]]:
    """Ranges of query blocks, each with at most MAX_SCORES scores (but at least one row)."""
    if num_q > 0 and num_q * scores_per_row <= MAX_SCORES:
        return [(0, num_q)]  # so that torch.export, told that the batch may change, learns a bound and not this batch
    rows = max(MAX_SCORES // max(scores_per_row, 1), 1)
    return [(start, min(start + rows, num_q)) for start in range(0, num_q, rows)]


def rank_in_chunks(
    scores_of: Callable[[int, int], Tensor], num_q: int, num_kv: int, lists: int, budget: Budget
) -> tuple[Tensor, Tensor]:
    """`rank` for scores that are made as they are needed, so that NQ x NK of them never exist at a time.

    Args:
        scores_of: gives the scores [..., stop - start, NK] of the query blocks from start to stop.
        num_q, num_kv: NQ and NK.
        lists: how many entries (batch and heads) there are before NQ; with them, at most MAX_SCORES exist at a time.
        budget: as for `rank`.

    Raises:
        BudgetError: budget is something else, or keep_self is asked for and NQ differs from NK.
    """
    _check_budget(budget, num_q, num_kv)
    chunks = row_chunks(num_q, lists * num_kv)
    parts = [_rank(scores_of(start, stop), budget, None, start) for start, stop in chunks]
    if len(parts) == 1:
        return parts[0]
    counts, indices = zip(*parts, strict=True)
    return torch.cat(counts, -1), torch.cat(indices, -2)


def _check_budget(budget: Budget, num_q: int, num_kv: int) -> None:
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget must be a Budget such as Budget(keep_ratio=0.125), got {budget!r}")
    if budget.keep_self and num_q != num_kv:
        raise BudgetError(f"keep_self needs as many query blocks as key blocks, got {num_q} and {num_kv}")


def _rank(scores: Tensor, budget: Budget, forced: Tensor | None, first_row: int) -> tuple[Tensor, Tensor]:
    """Rows first_row and on of `rank`."""
    num_q, num_kv = scores.shape[-2:]
    width = budget.blocks(num_kv)
    scores = scores.detach().float()
    if budget.top_p in (None, 1) and kernels_on(scores.device) and num_kv <= MAX_KERNEL_BLOCKS:
        forced = None if forced is None else forced.expand(scores.shape)
        return _top_blocks(scores, forced, width, budget.keep_first, budget.keep_self, first_row)

    scores = scores.nan_to_num(nan=float("-inf"))
    column = torch.arange(num_kv, device=scores.device)
    if budget.keep_first:
        first = column < budget.keep_first
        forced = first if forced is None else forced | first
    if budget.keep_self:
        own = column == first_row + torch.arange(num_q, device=scores.device)[:, None]
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


def _top_blocks_kernel(
    scores: Tensor, forced: Tensor | None, width: int, keep_first: int, keep_self: bool, first_row: int
) -> tuple[Tensor, Tensor]:
    from openvsa.plan import kernels

    return kernels.top_blocks(scores, forced, width, keep_first, keep_self, first_row)


def _fake_top_blocks(scores: Tensor, forced: Tensor | None, width: int, *_: object) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:-1]
    return scores.new_empty(rows, dtype=torch.int32), scores.new_empty((*rows, width), dtype=torch.int32)


_top_blocks = torch_op("top_blocks", _top_blocks_kernel, _fake_top_blocks)


def _ordered_keys(scores: Tensor, column: Tensor) -> Tensor:
    """int64 keys that sort like the fp32 scores, with no two alike: of equal scores the lower column is greater."""
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) + (column.numel() - 1 - column)
