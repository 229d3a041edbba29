"""What the kernels are compared with: the reference on whole problems, and block by block on problems too long for it.

The block-by-block form computes a few chosen query blocks (their output, lse and dq) and key blocks (their dk and dv,
which needs every query block that reads them) from the formulas, in any dtype, with memory that does not grow with the
square of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from openvsa.ops.reference import reference_attention
from openvsa.plan import BlockPlan

__all__ = [
    "Inputs",
    "Results",
    "RowResults",
    "Rows",
    "Sample",
    "row_sensitivity",
    "run_reference",
    "run_rows",
    "run_sample",
    "sample_sensitivity",
    "sampled",
    "sensitivity",
]

# Largest tensor that `run_sample` makes.
_CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


class Inputs(NamedTuple):
    """A problem in block order: q [B, Sq, H, D], k and v [B, Skv, Hkv, D], grad_out like q, grad_lse [B, H, Sq]."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    grad_out: Tensor
    grad_lse: Tensor
    scale: float


class Results(NamedTuple):
    """Of a whole problem, or of the sampled part of it."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Sample(NamedTuple):
    """Which part of a long problem is computed: one batch entry, one key head (with the first query head that reads
    it), and the chosen query and key blocks."""

    batch: int
    kv_head: int
    q_blocks: tuple[int, ...]
    kv_blocks: tuple[int, ...]


class Rows(NamedTuple):
    """Single queries of a long problem, for each query head a batch entry and the positions of tokens, int64 [N]."""

    batches: tuple[int, ...]
    tokens: tuple[Tensor, ...]

    def of(self, x: Tensor) -> Tensor:
        """Those of x [B, S, H, D], [sum of N, D], head by head."""
        return torch.cat([x[b, at, head] for head, (b, at) in enumerate(zip(*self, strict=True))])


class RowResults(NamedTuple):
    """Of the chosen rows of all heads: out and dq [sum of N, D], lse [sum of N]."""

    out: Tensor
    lse: Tensor
    dq: Tensor


def run_reference(inputs: Inputs, dtype: torch.dtype) -> Results:
    """The oracle and its gradients in `dtype`, on plain contiguous copies."""
    q, k, v = (x.detach().to(dtype).clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    plan = inputs.plan
    out, lse = reference_attention(
        q, k, v, plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, inputs.scale
    )
    grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out.to(dtype), inputs.grad_lse.to(lse.dtype)))
    return Results(out.detach(), lse.detach(), *grads)


def sensitivity(inputs: Inputs, exact: Results) -> Results:
    """The `terms` of the tolerance, in fp64: what a result is the difference of, and how it answers to its scores.

    A score is a dot product, and so is each half of its gradient p * (do . v - (do . out - dlse)); the size of a dot
    product is the sum of its absolute terms. p itself is exp(score - lse), so that an ulp of a score or of the lse,
    which backward receives as it was rounded, changes p by as much in proportion. Sums over tokens add up like noise.
    """
    q, k, v, grad_out = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    mask = inputs.plan.block_mask()
    for d, blocks in ((2, inputs.plan.q_blocks), (3, inputs.plan.kv_blocks)):
        mask = mask.repeat_interleave(blocks.lens_on(mask.device).long(), dim=d)

    def dots(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", a, b)

    scores = (dots(q, k) * inputs.scale).masked_fill(~mask, float("-inf"))
    p = (scores - exact.lse[..., None].nan_to_num(neginf=0.0)).exp()
    score = (dots(q.abs(), k.abs()) * inputs.scale * mask).amax(-1)
    row = (grad_out * exact.out).transpose(1, 2)
    grad_lse = inputs.grad_lse.double()
    ds = p * (dots(grad_out, v) - (row.sum(-1) - grad_lse)[..., None])
    ds = (
        p * (dots(grad_out.abs(), v.abs()) + (row.abs().sum(-1) + grad_lse.abs())[..., None])
        + ds.abs() * score[..., None]
    )

    def noise(weights: Tensor, x: Tensor, form: str) -> Tensor:
        return torch.einsum(form, weights**2, x**2)

    p2, out = p**2, exact.out
    away = noise(p, v, "bhqk,bkhd->bqhd") - 2 * out * torch.einsum("bhqk,bkhd->bqhd", p2, v)
    away = away + out**2 * p2.sum(-1).transpose(1, 2)[..., None]  # sum of p**2 * (v - out)**2
    dk, dv = (
        noise(w, x, "bhqk,bqhd->bkhd").unflatten(2, (-1, groups)).sum(3).sqrt()
        for w, x in ((ds * inputs.scale, q), (p * score[..., None], grad_out))
    )
    return Results(
        out=away.clamp_min(0).sqrt() * score.transpose(1, 2)[..., None],
        lse=score,
        dq=noise(ds * inputs.scale, k, "bhqk,bkhd->bqhd").sqrt(),
        dk=dk,
        dv=dv,
    )


def sampled(found: dict[str, Tensor], plan: BlockPlan, sample: Sample, groups: int) -> dict[str, Tensor]:
    """The part of whole results (named as in Results) that `run_sample` computes: out, dq [rows, D], lse [rows], dk and
    dv [columns, D]. `groups` is the number of query heads of a key head."""
    head, kv_head = sample.kv_head * groups, sample.kv_head
    rows = _tokens(plan.q_blocks.lens, sample.q_blocks, plan.device)
    columns = _tokens(plan.kv_blocks.lens, sample.kv_blocks, plan.device)
    take = {"out": (rows, head), "lse": (head, rows), "dq": (rows, head), "dk": (columns, kv_head),
            "dv": (columns, kv_head)}  # fmt: skip
    return {name: x[(sample.batch, *take[name])] for name, x in found.items()}


def run_sample(inputs: Inputs, sample: Sample, dtype: torch.dtype) -> Results:
    """The sampled part of a problem by the formulas of attention and its gradient, computed in `dtype`; sums over
    chunks of query blocks are kept in fp32 or better. `grad_lse` is taken to be zero."""
    return _walk(inputs, sample, dtype, _chunk)


def sample_sensitivity(inputs: Inputs, sample: Sample) -> Results:
    """The sampled part of `sensitivity`."""
    squares = _walk(inputs, sample, torch.float64, _chunk_sensitivity)
    return squares._replace(dk=squares.dk.sqrt(), dv=squares.dv.sqrt())


def run_rows(inputs: Inputs, rows: Rows, dtype: torch.dtype) -> RowResults:
    """The chosen rows of a problem by the formulas of attention and its gradient, computed in `dtype`."""
    return _each_head(inputs, rows, dtype, _chunk)


def row_sensitivity(inputs: Inputs, rows: Rows) -> RowResults:
    """The chosen rows of `sensitivity`."""
    return _each_head(inputs, rows, torch.float64, _chunk_sensitivity)


def _each_head(inputs: Inputs, rows: Rows, dtype: torch.dtype, of_rows: _OfRows) -> RowResults:
    plan, groups = inputs.plan, inputs.q.shape[2] // inputs.k.shape[2]
    device = inputs.q.device
    mask, block_of = plan.block_mask(), plan.q_blocks.block_of_token(device)
    kv_lens, no_columns = plan.kv_blocks.lens_on(device).long(), torch.arange(0, device=device)
    found = []
    for head, (b, tokens) in enumerate(zip(*rows, strict=True)):
        q, do = (x[b, tokens, head].to(dtype) for x in (inputs.q, inputs.grad_out))
        k, v = (x[b, :, head // groups].to(dtype) for x in (inputs.k, inputs.v))
        reads = mask[b if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0, block_of[tokens]]
        hidden = ~reads.repeat_interleave(kv_lens, 1)
        found.append(of_rows(q, k, v, do, hidden, no_columns, inputs.scale)[:3])
    out, lse, dq = (torch.cat(parts) for parts in zip(*found, strict=True))
    return RowResults(out, lse if dtype == torch.float64 else lse.float(), dq)


class _Chunk(NamedTuple):
    """Some rows: out, lse, dq, and what they add to dk and dv of the sampled columns."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


_OfRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], _Chunk]


def _walk(inputs: Inputs, sample: Sample, dtype: torch.dtype, of_rows: _OfRows) -> Results:
    """`of_rows` over every query block that the sample needs, a few at a time."""
    plan, b = inputs.plan, sample.batch
    groups = inputs.q.shape[2] // inputs.k.shape[2]
    first = sample.kv_head * groups
    k, v = (x[b, :, sample.kv_head].to(dtype) for x in (inputs.k, inputs.v))
    columns = _tokens(plan.kv_blocks.lens, sample.kv_blocks, k.device)
    kv_lens = plan.kv_blocks.lens_on(k.device).long()
    mask = plan.block_mask()
    mask = mask[b if mask.shape[0] > 1 else 0]
    wide = torch.promote_types(dtype, torch.float32)
    dk, dv = (torch.zeros(columns.numel(), x.shape[-1], dtype=wide, device=x.device) for x in (k, v))
    wanted: dict[int, tuple[Tensor, ...]] = {}
    a_chunk = max(1, _CHUNK_BYTES[k.device.type] // (k.shape[0] * dtype.itemsize * plan.q_blocks.max_len))
    for head in range(first, first + groups):
        reads = mask[head if mask.shape[0] > 1 else 0]
        needed = set(reads[:, list(sample.kv_blocks)].any(1).nonzero().flatten().tolist())
        needed |= set(sample.q_blocks) if head == first else set()
        order = sorted(needed)
        for start in range(0, len(order), a_chunk):
            blocks = order[start : start + a_chunk]
            lens = [plan.q_blocks.lens[i] for i in blocks]
            tokens = _tokens(plan.q_blocks.lens, tuple(blocks), k.device)
            q, do = (x[b, tokens, head].to(dtype) for x in (inputs.q, inputs.grad_out))
            hidden = ~reads[blocks].repeat_interleave(kv_lens, 1)
            hidden = hidden.repeat_interleave(torch.tensor(lens, device=hidden.device), 0)
            found = of_rows(q, k, v, do, hidden, columns, inputs.scale)
            dk += found.dk.to(wide)
            dv += found.dv.to(wide)
            if head == first:
                parts = (x.split(lens) for x in found[:3])
                wanted |= dict(zip(blocks, zip(*parts, strict=True), strict=True))
    out, lse, dq = (torch.cat([wanted[i][n] for i in sample.q_blocks]) for n in range(3))
    return Results(out, lse if dtype == torch.float64 else lse.float(), dq, dk.to(dtype), dv.to(dtype))


def _chunk(q: Tensor, k: Tensor, v: Tensor, do: Tensor, hidden: Tensor, columns: Tensor, scale: float) -> _Chunk:
    empty = hidden.all(1, keepdim=True)
    scores = (q @ k.t() * scale).masked_fill(hidden, float("-inf"))
    p = scores.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0)
    dp = do @ v.t()
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    return _Chunk(
        out=p @ v,
        lse=scores.logsumexp(1),
        dq=ds @ k * scale,
        dk=ds[:, columns].t() @ q * scale,
        dv=p[:, columns].t() @ do,
    )


def _chunk_sensitivity(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, hidden: Tensor, columns: Tensor, scale: float
) -> _Chunk:
    """As `sensitivity`, whose docstring has the reasons; dk and dv as squares, which add up over rows."""
    empty = hidden.all(1, keepdim=True)
    scores = (q @ k.t() * scale).masked_fill(hidden, float("-inf"))
    p = scores.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0)
    score = (q.abs() @ k.abs().t() * scale).masked_fill(hidden, 0.0).amax(1)
    out = p @ v
    row = do * out
    ds = p * (do @ v.t() - row.sum(1, keepdim=True))
    ds = p * (do.abs() @ v.abs().t() + row.abs().sum(1, keepdim=True)) + ds.abs() * score[:, None]
    p2, ds2 = p**2, (ds * scale) ** 2
    away = p2 @ v**2 - 2 * out * (p2 @ v) + out**2 * p2.sum(1, keepdim=True)
    return _Chunk(
        out=away.clamp_min(0).sqrt() * score[:, None],
        lse=score,
        dq=(ds2 @ k**2).sqrt(),
        dk=ds2[:, columns].t() @ q**2,
        dv=((p * score[:, None])[:, columns] ** 2).t() @ do**2,
    )


def _tokens(lens: tuple[int, ...], blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """The positions of the tokens of some blocks, int64."""
    starts = [0, *accumulate(lens)]
    tokens = [torch.arange(starts[i], starts[i + 1]) for i in blocks]
    return torch.cat([torch.arange(0), *tokens]).to(device)
