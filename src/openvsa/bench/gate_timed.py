"""The very problem that is timed, checked before and after it is timed.

It is too long to compute whole in fp64. Compared are single query rows of every head, all tokens of a few key blocks,
and for each head two sums that gradients must keep, which no head that is wrong as a whole does. For the whole op,
the choice of tiles is compared with scores in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openvsa.bench.contenders import Attend
from openvsa.bench.oracle import (
    Inputs,
    Results,
    RowResults,
    Rows,
    Sample,
    row_sensitivity,
    run_rows,
    run_sample,
    sample_sensitivity,
    sampled,
)
from openvsa.bench.tolerance import FORWARD, GRADIENT, judge, naive_dtype
from openvsa.config import Budget
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan
from openvsa.select import pool_mean

__all__ = ["Expected", "TimedCheck", "check_attention", "check_selection", "check_whole_op", "expect"]

# Rows of a head, each of another query block.
_MOST_ROWS = 256
# What the two sides of a sum may be apart, in units of the rounding of their terms. Plain torch gets to .4 in half
# precision and in fp32, where what is summed inside is rounded as well, to 3; without gradients it is 2 to 200 and
# 10,000 and more (four heads of 1,024 tokens).
_SUMS_APART, _LEAST_ROUNDING = 4.0, 2.0**-20
# Rounding of a score in fp32, as a share of the product of mean absolute queries and keys.
_SCORE_ROUNDING = 2.0**-16


class TimedCheck(NamedTuple):
    """What is wrong, in words, and the largest share of the allowed error."""

    complaints: list[str]
    share: float


class Expected(NamedTuple):
    """What the oracle and plain torch in the dtype of the problem say, and the terms of the tolerance."""

    rows: Rows
    of_rows: tuple[RowResults, RowResults, RowResults]
    blocks: tuple[tuple[Sample, Results, Results, Results], ...]


def expect(inputs: Inputs, kv_heads: int) -> Expected:
    """What is expected of a contender on these inputs; key blocks of so many key heads, at most two. They take
    the longest, and the longer the more queries read them."""
    dtype = naive_dtype(inputs.q.dtype)
    rows = _choose_rows(inputs)
    of_rows = run_rows(inputs, rows, torch.float64), run_rows(inputs, rows, dtype), row_sensitivity(inputs, rows)
    blocks = tuple(
        (sample, run_sample(inputs, sample, torch.float64), run_sample(inputs, sample, dtype),
         sample_sensitivity(inputs, sample))
        for sample in _choose_blocks(inputs)[:kv_heads]
    )  # fmt: skip
    return Expected(rows, of_rows, blocks)


def check_attention(
    name: str, attend: Attend, inputs: Inputs, expected: Expected, *, heads_first: bool, needs_grad: bool
) -> TimedCheck:
    """A contender on the timed tensors, without lse."""
    given = (inputs.q, inputs.k, inputs.v, inputs.grad_out)
    q, k, v, grad = (x.detach().transpose(1, 2) if heads_first else x.detach() for x in given)
    leaves = [x.contiguous().requires_grad_(needs_grad) for x in (q, k, v)]
    out = attend(*leaves)
    found = {"out": out.detach()}
    if needs_grad:
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, grad), strict=True))
    found = {what: x.transpose(1, 2) if heads_first else x for what, x in found.items()}
    complaints, share = [], 0.0
    for what in ("out", "dq"):
        if what in found:
            exact, naive, terms = (getattr(part, what) for part in expected.of_rows)
            rule = FORWARD if what == "out" else GRADIENT
            verdict = judge(expected.rows.of(found[what]), naive, exact, rule, terms)
            complaints += [f"{name}: {what}: {complaint}" for complaint in verdict.complaints]
            share = max(share, verdict.share)
    groups = inputs.q.shape[2] // inputs.k.shape[2]
    for sample, *parts in expected.blocks if needs_grad else ():
        part = sampled({what: found[what] for what in ("dk", "dv")}, inputs.plan, sample, groups)
        for what, got in part.items():
            exact, naive, terms = (getattr(x, what) for x in parts)
            verdict = judge(got, naive, exact, GRADIENT, terms)
            complaints += [f"{name}: {what}: {complaint}" for complaint in verdict.complaints]
            share = max(share, verdict.share)
    if needs_grad:
        complaints += [f"{name}: {why}" for why in _sums_apart(*given, **found)]
    return TimedCheck(complaints, share)


def check_whole_op(
    attend: Attend, inputs: Inputs, weight: Tensor, layout: TileLayout, expected: Expected, *, needs_grad: bool
) -> TimedCheck:
    """`attend` is `video_sparse_attention` of q, k, v and the branch weight in raster order. `inputs` are in block
    order, with the plan of the selector, and so is `weight`."""
    given = [layout.unpermute(x.detach()) for x in (inputs.q, inputs.k, inputs.v, weight)]
    grad = layout.unpermute(inputs.grad_out)
    leaves = [x.requires_grad_(needs_grad) for x in given]
    out = attend(*leaves)
    found = {"out": out.detach()}
    if needs_grad:
        found |= dict(zip(("dq", "dk", "dv", "dw"), torch.autograd.grad(out, leaves, grad), strict=True))
    rows = expected.rows
    weights, grads = rows.of(weight), rows.of(inputs.grad_out)
    complaints, share = [], 0.0
    for what in ("out", "dw"):
        if what not in found:
            continue
        # By the oracle and by plain torch.
        wanted = []
        for sparse in expected.of_rows[:2]:
            dtype = sparse.out.dtype
            branch = _compressed_rows(inputs, layout, rows, torch.promote_types(dtype, torch.float32)).to(dtype)
            wanted.append(sparse.out + weights.to(dtype) * branch if what == "out" else grads.to(dtype) * branch)
        rule, terms = (FORWARD, expected.of_rows[2].out) if what == "out" else (GRADIENT, None)
        verdict = judge(rows.of(layout.permute(found[what])), wanted[1], wanted[0], rule, terms)
        complaints += [f"whole op: {what}: {complaint}" for complaint in verdict.complaints]
        share = max(share, verdict.share)
    if needs_grad:
        found.pop("dw")
        q, k, v, _ = given
        complaints += [f"whole op: {why}" for why in _sums_apart(q, k, v, grad, **found)]
    return TimedCheck(complaints, share)


def check_selection(q: Tensor, k: Tensor, plan: BlockPlan, layout: TileLayout, budget: Budget) -> list[str]:
    """What is wrong with a plan of `PooledTopK` over q and k in block order: every row must keep as many tiles as the
    budget says, none that scores lower in fp64 than one that it drops, and all text."""
    rows, tiles, mask = layout.q_tile_blocks, layout.tile_blocks, plan.block_mask()
    wanted, groups = budget.blocks(layout.num_tiles), q.shape[2] // k.shape[2]
    text = torch.ones_like(mask)
    text[:, :, rows, tiles] = False
    complaints = [] if mask[text].all() else ["a text block is not read by all, or does not read all"]
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            of_q, of_k = q[b, None, :, head, None].double(), k[b, None, :, head // groups, None].double()
            mean_q, size_q = (pool_mean(x, layout.q_blocks)[0, rows, 0] for x in (of_q, of_q.abs()))
            mean_k, size_k = (pool_mean(x, layout.blocks)[0, tiles, 0] for x in (of_k, of_k.abs()))
            scores, kept = mean_q @ mean_k.t(), mask[b, head, rows, tiles]
            if not (kept.sum(1) == wanted).all():
                complaints.append(f"head {head}: a row keeps other than {wanted} of {layout.num_tiles} tiles")
            lowest = scores.masked_fill(~kept, float("inf")).amin(1)
            highest = scores.masked_fill(kept, float("-inf")).amax(1)
            over = highest - lowest - _SCORE_ROUNDING * size_q.norm(dim=1) * size_k.norm(dim=1).max()
            if (over > 0).any():
                count = f"{int((over > 0).sum())} of {over.numel()}"
                complaints.append(f"head {head}: {count} rows drop a tile that scores higher than one they keep")
    return complaints


def _choose_rows(inputs: Inputs) -> Rows:
    """A token of each query block, of every `step`-th where there are many; heads begin at different blocks, so that
    together they see all."""
    generator = torch.Generator().manual_seed(1)
    blocks, (batch, _, heads, _) = inputs.plan.q_blocks, inputs.q.shape
    step = -(-blocks.num_blocks // _MOST_ROWS)
    ends = torch.tensor(blocks.lens).cumsum(0)
    lens = torch.tensor(blocks.lens)
    tokens = []
    for head in range(heads):
        inside = (torch.rand(lens.shape, generator=generator) * lens).long()
        tokens.append((ends - lens + inside)[head % step :: step].to(inputs.q.device))
    return Rows(tuple(head % batch for head in range(heads)), tuple(tokens))


def _choose_blocks(inputs: Inputs) -> list[Sample]:
    """A random and the last key block, of the last key head and of a random one: borders are where kernels err."""
    generator = torch.Generator().manual_seed(1)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    plan, batch, kv_heads = inputs.plan, inputs.q.shape[0], inputs.k.shape[2]
    q_block, kv_block = plan.q_blocks.num_blocks - 1, plan.kv_blocks.num_blocks - 1
    places = dict.fromkeys([(batch - 1, kv_heads - 1), (pick(batch), pick(kv_heads))])
    return [
        Sample(b, head, (q_block,), tuple(sorted({pick(plan.kv_blocks.num_blocks), kv_block}))) for b, head in places
    ]


def _sums_apart(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> list[str]:
    """What is wrong with the gradients of all tokens of a head together. Attention is linear in v and depends on q and
    k by their products alone, so v . dv sums up to out . grad, and k . dk to q . dq; the whole op, too."""
    groups = q.shape[2] // k.shape[2]
    complaints = []
    sums = {"v . dv is not out . grad": (v, dv, out, grad), "k . dk is not q . dq": (k, dk, q, dq)}
    for what, (a, da, c, dc) in sums.items():
        apart = torch.stack([
            _apart((a[b, :, head], da[b, :, head]), (c[b, :, of_head], dc[b, :, of_head]))
            for b in range(q.shape[0])
            for head in range(k.shape[2])
            for of_head in [slice(head * groups, (head + 1) * groups)]
        ])  # fmt: skip
        worst = float(apart.nan_to_num(nan=float("inf")).max())
        if worst > _SUMS_APART:
            allowed = f"where {_SUMS_APART:g} are allowed"
            complaints.append(f"gradients: {what}, {worst:.3g} times their rounding apart, {allowed}")
    return complaints


def _apart(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Tensor:
    """How far the sums of two products are apart, in units of their rounding: of what products of tokens and of single
    numbers add up to if each was rounded alone."""
    (first, noise), (second, more) = (_sum_and_noise(*pair) for pair in (one, two))
    rounding = max(torch.finfo(one[1].dtype).eps, _LEAST_ROUNDING) * (noise + more).sqrt()
    return (first - second).abs() / rounding.clamp_min(1e-300)


def _sum_and_noise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a product in fp64, and the squares of its terms."""
    product = x.detach().double() * y.detach().double()
    return product.sum(), product.square().sum() + product.sum(-1).square().sum()


def _compressed_rows(inputs: Inputs, layout: TileLayout, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The compressed branch of the chosen rows, [N, D], computed in fp32 or fp64; text has none."""
    groups = inputs.q.shape[2] // inputs.k.shape[2]
    of_queries, tiles = layout.q_tile_blocks, layout.tile_blocks
    block_of = layout.q_blocks.block_of_token(inputs.q.device)
    found = []
    for head, (b, tokens) in enumerate(zip(*rows, strict=True)):
        q, k, v = (
            pool_mean(x[b, None, :, h, None].to(dtype), blocks)[0, :, 0]
            for x, h, blocks in (
                (inputs.q, head, layout.q_blocks),
                (inputs.k, head // groups, layout.blocks),
                (inputs.v, head // groups, layout.blocks),
            )
        )
        compressed = v.new_zeros(layout.q_blocks.num_blocks, v.shape[1])
        compressed[of_queries] = (q[of_queries] @ k[tiles].t() * inputs.scale).softmax(-1) @ v[tiles]
        found.append(compressed[block_of[tokens]])
    return torch.cat(found)
