"""What one attention call loses to a plan: exact attention mass and output error, against the best plan of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.layout import BlockOffsets, TileLayout
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select import Selector

__all__ = ["CallFigures", "CurvePoint", "audit_call", "audit_plans", "exact_attention", "oracle_plan"]

MAX_SCORES = 1 << 24
"""Probabilities that exist at a time: 64 MiB of fp32."""


@dataclass(frozen=True)
class CurvePoint:
    """One density asked for: the delivered density and the summed squared output error of each head."""

    asked: float
    density: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class CallFigures:
    """One attention call, first sample of the batch; tuples have one entry per head.

    density: share of pairs of blocks that the selector's plan keeps. recall, oracle_recall: share of the exact
    attention mass on the blocks that it keeps, and on the best tiles of the same number (see `oracle_plan`); mean over
    query tokens. output: summed squared dense output. error, oracle_error: summed squared difference of the sparse
    output from it. curve: the same at other densities, ascending. Text counts everywhere, as queries and as keys.
    """

    density: tuple[float, ...]
    recall: tuple[float, ...]
    oracle_recall: tuple[float, ...]
    output: tuple[float, ...]
    error: tuple[float, ...]
    oracle_error: tuple[float, ...]
    curve: tuple[CurvePoint, ...]


@torch.no_grad()
def audit_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    selector: Selector,
    budget: Budget,
    *,
    densities: Sequence[float] = (),
    max_rows: int = 256,
) -> CallFigures:
    """Measure what a selector chooses in one call, in fp32, on the inputs that dense attention had.

    Args:
        q, k, v: [B, S, H, D] and [B, S, Hkv, D] in block order; only the first sample is looked at.
        densities: where to measure the curve of error against density.
        max_rows: query blocks to look at, evenly spread; all of them if there are no more. Exact attention mass takes
            time that grows with rows x S, and memory is bounded whatever S is.
    """
    q, k, v = (x[:1].detach() for x in (q, k, v))
    curve = {share: selector(q, k, layout, Budget(keep_ratio=share)) for share in sorted(densities)}
    return audit_plans(q, k, v, layout, selector(q, k, layout, budget), curve, max_rows=max_rows)


@torch.no_grad()
def audit_plans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    plan: BlockPlan,
    curve: Mapping[float, BlockPlan],
    *,
    max_rows: int,
) -> CallFigures:
    """What `audit_call` measures, of plans that are there: q [1, S, H, D] and k, v [1, S, Hkv, D]; `curve` has one for
    each density asked for, ascending, over the same query blocks as `plan`."""
    num_rows = plan.q_blocks.num_blocks
    rows = [index * num_rows // min(num_rows, max_rows) for index in range(min(num_rows, max_rows))]
    if len(rows) < num_rows:
        q = q[:, _tokens_of(plan.q_blocks, rows, q.device)]
        plan, curve = _rows_of(plan, rows), {share: _rows_of(one, rows) for share, one in curve.items()}
    q, k, v = q.float(), k.float(), v.float()
    mass, dense = exact_attention(q, k, v, plan.q_blocks, plan.kv_blocks)
    oracle = oracle_plan(mass, plan, layout)

    def error(plan: BlockPlan) -> tuple[float, ...]:
        return _per_head((block_sparse_attention(q, k, v, plan) - dense).square().sum((0, 1, 3)))

    heads = q.shape[2]
    return CallFigures(
        density=_density(plan, heads),
        recall=_recall(mass, plan),
        oracle_recall=_recall(mass, oracle),
        output=_per_head(dense.square().sum((0, 1, 3))),
        error=error(plan),
        oracle_error=error(oracle),
        curve=tuple(CurvePoint(share, _density(one, heads), error(one)) for share, one in curve.items()),
    )


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: BlockOffsets, kv_blocks: BlockOffsets
) -> tuple[Tensor, Tensor]:
    """Dense attention with the probability mass between blocks, for q [1, Sq, H, D] and k, v [1, S, Hkv, D] in fp32.

    Returns the mass [H, NQ, NK], mean over the tokens of a query block, so that a row sums to 1, and the output
    [1, Sq, H, D]. Runs over a few query blocks of a head at a time: at most MAX_SCORES probabilities exist (or one
    block's), whatever S is.
    """
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    num_q, num_kv = q_blocks.num_blocks, kv_blocks.num_blocks
    mass, out = q.new_zeros(heads, num_q, num_kv), torch.empty_like(q)
    offsets = [0]
    for length in q_blocks.lens:
        offsets.append(offsets[-1] + length)
    column = kv_blocks.block_of_token(q.device)
    per_chunk = max(1, MAX_SCORES // (k.shape[1] * q_blocks.max_len))
    for head in range(heads):
        keys, values = k[0, :, head // group], v[0, :, head // group]
        for start in range(0, num_q, per_chunk):
            stop = min(start + per_chunk, num_q)
            tokens = slice(offsets[start], offsets[stop])
            probability = (q[0, tokens, head] @ keys.T * q.shape[-1] ** -0.5).softmax(-1)
            out[0, tokens, head] = probability @ values
            by_column = q.new_zeros(probability.shape[0], num_kv).index_add_(1, column, probability)
            row = torch.repeat_interleave(torch.arange(stop - start), torch.tensor(q_blocks.lens[start:stop]))
            mass[head, start:stop].index_add_(0, row.to(q.device), by_column)
    return mass / q_blocks.lens_on(q.device)[:, None], out


def oracle_plan(mass: Tensor, plan: BlockPlan, layout: TileLayout) -> BlockPlan:
    """The plan that keeps in every row as many tiles as `plan` does, those with the most exact mass [H, NQ, NK]. Text
    stays as it is in `plan`: left out, a block of a few words would make room for a whole tile."""
    width = plan.kv_indices.shape[-1]
    counts = plan.kv_num_blocks[:1].expand(1, mass.shape[0], -1)
    text = torch.ones(layout.num_blocks, dtype=torch.bool, device=mass.device)
    text[layout.tile_blocks] = False
    kept = plan.block_mask()[0]
    mass = mass.masked_fill(text & kept, torch.inf).masked_fill(text & ~kept, -1.0)
    best = mass.topk(width, dim=-1).indices[None]
    past = torch.arange(width, device=mass.device) >= counts[..., None]
    indices = best.masked_fill(past, plan.kv_blocks.num_blocks).sort(-1).values.masked_fill(past, 0)
    return BlockPlan(counts.contiguous(), indices.int(), plan.q_blocks, plan.kv_blocks)


def _recall(mass: Tensor, plan: BlockPlan) -> tuple[float, ...]:
    kept = (mass * plan.block_mask()[0]).sum(-1)
    lens = plan.q_blocks.lens_on(mass.device)
    return _per_head((kept * lens).sum(-1) / plan.q_blocks.num_tokens)


def _density(plan: BlockPlan, heads: int) -> tuple[float, ...]:
    return _per_head((plan.kv_num_blocks[0].float().mean(-1) / plan.kv_blocks.num_blocks).expand(heads))


def _per_head(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())


def _tokens_of(blocks: BlockOffsets, rows: list[int], device: torch.device) -> Tensor:
    chosen = torch.zeros(blocks.num_blocks, dtype=torch.bool)
    chosen[rows] = True
    return chosen.to(device)[blocks.block_of_token(device)].nonzero().squeeze(1)


def _rows_of(plan: BlockPlan, rows: list[int]) -> BlockPlan:
    """The plan of some query blocks, as if the sequence of queries held no others."""
    lens = [plan.q_blocks.lens[row] for row in rows]
    at = torch.tensor(rows, device=plan.device)
    return BlockPlan(plan.kv_num_blocks[:, :, at], plan.kv_indices[:, :, at], BlockOffsets(lens), plan.kv_blocks)
