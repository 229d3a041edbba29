"""Nothing is timed that is not right: kernels against the fp64 oracle, on small ragged problems.

They have the head size, dtype, tiles and head groups of the timed case, so that the kernels they compile are those that
are timed. `gate_timed` checks the timed problem itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from openvsa.bench.cases import Case
from openvsa.bench.gate_timed import check_selection
from openvsa.bench.oracle import Inputs, Results, run_reference, sensitivity
from openvsa.bench.tolerance import FORWARD, GRADIENT, judge, naive_dtype
from openvsa.config import Budget
from openvsa.layout import BlockOffsets, TileLayout
from openvsa.nn.functional import video_sparse_attention
from openvsa.ops import block_sparse_attention
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.reference import reference_attention
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK

__all__ = ["Checked", "Expected", "check_small", "plain_vsa"]

_BATCH, _SHARE = 2, 0.4


class Checked(NamedTuple):
    """The outcome for one backend: problems compared, what is wrong, the largest share of the allowed error, and why
    problems were left out."""

    compared: int
    complaints: list[str]
    share: float
    left_out: list[str]

    def and_also(self, other: Checked) -> Checked:
        return Checked(
            self.compared + other.compared,
            self.complaints + other.complaints,
            max(self.share, other.share),
            self.left_out + other.left_out,
        )


NOTHING = Checked(0, [], 0.0, [])


def check_small(backend: Backend, case: Case, device: torch.device) -> Checked:
    """A backend on the small problems of a case: output, lse and gradients of the op, and of the whole op."""
    total = NOTHING
    for name, inputs, layout in _small_problems(case, device):
        q, k, v, plan = inputs.q, inputs.k, inputs.v, inputs.plan
        needs_grad = not backend.unsupported_reasons(Problem.of(q.detach().requires_grad_(), k, v, plan))
        reasons = [] if needs_grad else backend.unsupported_reasons(Problem.of(q, k, v, plan))
        if reasons:
            total = total.and_also(Checked(0, [], 0.0, [f"{name}: {'; '.join(reasons)}"]))
            continue
        exact = run_reference(inputs, torch.float64)
        naive = run_reference(inputs, naive_dtype(inputs.q.dtype))
        kernel = _op(backend.name, inputs, needs_grad)
        found = _compare(name, kernel, Expected(exact, naive, sensitivity(inputs, exact)))
        if layout is not None and needs_grad:
            found = found.and_also(_check_whole_op(backend.name, f"whole op, {name}", inputs, layout))
        total = total.and_also(found)
    return total


class Expected(NamedTuple):
    """The oracle's results, those of plain torch in the dtype of the problem, and the terms of the tolerance."""

    exact: Results
    naive: Results
    terms: Results


def _small_problems(case: Case, device: torch.device) -> Iterator[tuple[str, Inputs, TileLayout | None]]:
    """A ragged lattice, with its layout, and a sequence of equal blocks."""
    grid = tuple(2 * n * t + 1 for n, t in zip(case.layout.q_tiles, case.layout.tile, strict=True))
    prefix = min(case.prefix, math.prod(case.tile) + 3)
    ragged = TileLayout(grid, case.tile, prefix, q_tiles=case.q_tiles)
    yield "ragged lattice", _inputs(case, ragged, device), ragged
    size, ratio = math.prod(case.layout.tile), math.prod(case.layout.q_tiles)
    equal = TileLayout((5 * size * ratio - size // 3,), (size,), q_tiles=(ratio,))
    yield "equal blocks, the last one shorter", _inputs(case, equal, device), None


def _inputs(case: Case, layout: TileLayout, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    heads, kv_heads = 2 * case.heads // case.key_heads, 2
    shape = (_BATCH, heads, layout.q_blocks.num_blocks, layout.num_blocks)
    mask = torch.rand(shape, generator=generator, device=device) < _SHARE
    mask[..., 0] = True
    mask[:, :, shape[2] // 2] = False  # a query block that reads nothing
    plan = BlockPlan.from_block_mask(mask, layout.q_blocks, layout.blocks)

    def tokens(count: int) -> Tensor:
        x = torch.randn(_BATCH, layout.num_tokens, count, case.head_dim, generator=generator, device=device)
        return x.to(case.torch_dtype)

    grad_lse = torch.zeros(_BATCH, heads, layout.num_tokens, device=device)
    q, k, v, grad_out = tokens(heads), tokens(kv_heads), tokens(kv_heads), tokens(heads)
    return Inputs(q, k, v, plan, grad_out, grad_lse, case.head_dim**-0.5)


def _op(backend: str, inputs: Inputs, needs_grad: bool) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    out, lse = block_sparse_attention(q, k, v, inputs.plan, backend=backend, return_lse=True)
    found = {"out": out.detach(), "lse": lse.detach()}
    if needs_grad:
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs.grad_out), strict=True))
    return found


def _compare(name: str, kernel: dict[str, Tensor], expected: Expected) -> Checked:
    complaints, share = [], 0.0
    for what, got in kernel.items():
        naive, exact, terms = (getattr(part, what) for part in (expected.naive, expected.exact, expected.terms))
        verdict = judge(got, naive, exact, FORWARD if what in ("out", "lse") else GRADIENT, terms)
        complaints += [f"{name}: {what}: {complaint}" for complaint in verdict.complaints]
        share = max(share, verdict.share)
    return Checked(1, complaints, share, [])


# -- the whole op -----------------------------------------------------------------------------------------------------


def _check_whole_op(backend: str, name: str, inputs: Inputs, layout: TileLayout) -> Checked:
    """`video_sparse_attention` with a branch weight, and its four gradients, against its formulas in plain torch; the
    choice of blocks is taken from the selector, and compared with scores in fp64."""
    budget = Budget(keep_ratio=0.5)
    weight = torch.randn(inputs.q.shape, generator=torch.Generator(inputs.q.device).manual_seed(2),
                         device=inputs.q.device).to(inputs.q.dtype)  # fmt: skip
    tensors = (inputs.q, inputs.k, inputs.v, weight)
    in_blocks = layout.permute(inputs.q), layout.permute(inputs.k)
    plan = PooledTopK()(*in_blocks, layout, budget)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        q, k, v, w = (x.detach().to(dtype).requires_grad_() for x in tensors)
        out = plain_vsa(q, k, v, w, layout, plan)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, w), inputs.grad_out.to(dtype))]

    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, v, w = leaves
    out = video_sparse_attention(q, k, v, layout, budget, w, backend=backend)
    kernel = [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)]
    # What the sparse branch is the difference of; the compressed branch and its weight have smaller terms.
    q, k, v, grad_out = (layout.permute(x.detach()) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    sparse = Inputs(q, k, v, plan, grad_out, inputs.grad_lse, inputs.scale)
    terms = sensitivity(sparse, run_reference(sparse, torch.float64))
    terms = [layout.unpermute(x) for x in (terms.out, terms.dq, terms.dk, terms.dv)]
    complaints = [f"{name}: selection: {why}" for why in check_selection(*in_blocks, plan, layout, budget)]
    share = 0.0
    rows = zip(
        ("out", "dq", "dk", "dv", "dw"), kernel, plain(naive_dtype(out.dtype)), plain(torch.float64), [*terms, None],
        strict=True,
    )  # fmt: skip
    for what, got, naive, exact, of_terms in rows:
        verdict = judge(got, naive, exact, FORWARD if what == "out" else GRADIENT, of_terms)
        complaints += [f"{name}: {what}: {complaint}" for complaint in verdict.complaints]
        share = max(share, verdict.share)
    return Checked(1, complaints, share, [])


def plain_vsa(q: Tensor, k: Tensor, v: Tensor, w: Tensor, layout: TileLayout, plan: BlockPlan) -> Tensor:
    """Video sparse attention [B, S, H, D] in raster order with a given plan, in the dtype of its arguments."""
    order = layout.permutation.to(q.device)
    q, k, v, w = (x[:, order] for x in (q, k, v, w))
    scale = q.shape[-1] ** -0.5
    out, _ = reference_attention(q, k, v, plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, scale)
    q_pool, pool = (
        _membership(blocks, q)[rows]
        for blocks, rows in ((layout.q_blocks, layout.q_tile_blocks), (layout.blocks, layout.tile_blocks))
    )
    groups = q.shape[2] // k.shape[2]
    q_mean, k_mean, v_mean = (
        torch.einsum("ns,bshd->bhnd", members / members.sum(1, keepdim=True), x)
        for members, x in ((q_pool, q), (pool, k), (pool, v))
    )
    k_mean, v_mean = (x.repeat_interleave(groups, 1) for x in (k_mean, v_mean))
    compressed = (q_mean @ k_mean.transpose(2, 3) * scale).softmax(-1) @ v_mean
    out = out + w * torch.einsum("ns,bhnd->bshd", q_pool, compressed)
    return out[:, layout.inverse_permutation.to(q.device)]


def _membership(blocks: BlockOffsets, like: Tensor) -> Tensor:
    """[N, S]: 1 where the token is of the block."""
    members = like.new_zeros(blocks.num_blocks, blocks.num_tokens)
    members[blocks.block_of_token(like.device), torch.arange(blocks.num_tokens, device=like.device)] = 1
    return members
