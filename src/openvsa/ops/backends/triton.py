"""The Triton backend: block-sparse attention forward and backward on GPUs with tensor cores.

Three kernels, none with atomics, so results repeat bit for bit:
  forward   one program per query block and head walks the list of key blocks with an online softmax
            (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691);
  dq        the same walk, recomputing the weights from lse; it also leaves the row term `delta` for the third kernel;
  dkv       one program per key block and key head walks the query blocks that read it, over its group of query heads.

Blocks are contiguous runs of tokens of any length from 1 to 128. A kernel walks blocks in pieces of at most
BLOCK_M query rows and BLOCK_N key rows. Rows of a piece past the end of its block repeat the last token of the
block: nothing outside the block is ever read, loads of rows need no mask, and what those rows would add is removed
by a bias of -inf on their scores.

Scores are kept in units of log2 inside the kernels (exp2 is the native instruction); lse leaves in natural log.
The scale multiplies the fp32 product: folding it into bf16 keys would round it.

Numbers that change from call to call (blocks, list width, tokens) are not specialised on, so that a new density or
length compiles nothing again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from openvsa.ops.plan_tensors import PlanTensors

__all__ = ["backward", "forward"]

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED:  # which would multiply the bit patterns of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _first(x, strides, batch, head, start):
    """Pointer to one token of one head. 64-bit: a tensor may hold more than 2**31 elements."""
    return x + batch.to(tl.int64) * strides[0] + start.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def _load(x, strides, batch, head, start, length, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens start + rows, [len(rows), BLOCK_D]; rows past the end of the block repeat its last token."""
    dims = tl.arange(0, BLOCK_D)
    inside = tl.minimum(rows, length - 1)
    pointers = _first(x, strides, batch, head, start) + inside[:, None] * strides[1] + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def _store(x, strides, batch, head, start, length, rows, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of [len(rows), BLOCK_D] that lie in the block."""
    dims = tl.arange(0, BLOCK_D)
    pointers = _first(x, strides, batch, head, start) + rows[:, None] * strides[1] + dims[None, :]
    mask = (rows[:, None] < length) & (dims[None, :] < HEAD_DIM)
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _block(offsets, index):
    """First token and length of one block."""
    start = tl.load(offsets + index)
    return start, tl.load(offsets + index + 1) - start


@triton.jit(do_not_specialize=["num_q_blocks", "list_width", "seq_q"])
def _forward_kernel(
    q, k, v, out, lse,
    q_strides, k_strides, v_strides, out_strides,
    q_offsets, kv_offsets, kv_num_blocks, kv_indices,
    plan_steps, num_q_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // Q_PIECES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    q_start, q_length = _block(q_offsets, q_block)
    q_rows = (tl.program_id(0) % Q_PIECES) * BLOCK_M + tl.arange(0, BLOCK_M)
    list_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64) * num_q_blocks + q_block
    count = tl.load(kv_num_blocks + list_row)
    kv_list = kv_indices + list_row * list_width

    kv_head = head // GROUP
    q_tile = _load(q, q_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(count * KV_PIECES):
        entry = step // KV_PIECES
        kv_start, kv_length = _block(kv_offsets, tl.load(kv_list + entry))
        kv_rows = (step - entry * KV_PIECES) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = _load(k, k_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)
        bias = tl.where(kv_rows < kv_length, 0.0, float("-inf"))
        scores = _dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E) + bias[None, :]

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shrink = tl.exp2(row_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v_tile = _load(v, v_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        row_max = new_max

    # A row that read nothing has row_sum 0 and row_max -inf: dividing by 1 gives out 0 and lse -inf.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    _store(out, out_strides, batch, head, q_start, q_length, q_rows, acc, HEAD_DIM, BLOCK_D)
    lse_head = lse + (batch * tl.num_programs(1) + head).to(tl.int64) * seq_q
    tl.store(lse_head + q_start + q_rows, (row_max + tl.log2(row_sum)) * LN_2, mask=q_rows < q_length)


@triton.jit(do_not_specialize=["num_q_blocks", "list_width", "seq_q"])
def _dq_kernel(
    q, k, v, out, do, dq, lse, dlse, delta,
    q_strides, k_strides, v_strides, out_strides, do_strides, dq_strides,
    q_offsets, kv_offsets, kv_num_blocks, kv_indices,
    plan_steps, num_q_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // Q_PIECES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    q_start, q_length = _block(q_offsets, q_block)
    q_rows = (tl.program_id(0) % Q_PIECES) * BLOCK_M + tl.arange(0, BLOCK_M)
    list_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64) * num_q_blocks + q_block
    count = tl.load(kv_num_blocks + list_row)
    kv_list = kv_indices + list_row * list_width

    kv_head = head // GROUP
    q_tile = _load(q, q_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)
    do_tile = _load(do, do_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)
    out_tile = _load(out, out_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)

    # d loss / d score = p * (dp - sum(do * out) + dlse); the last two depend on the row alone.
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * seq_q + q_start + tl.minimum(q_rows, q_length - 1)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1) - tl.load(dlse + row)
    tl.store(delta + row, row_delta, mask=q_rows < q_length)
    row_lse = tl.load(lse + row) * LOG2_E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(count * KV_PIECES):
        entry = step // KV_PIECES
        kv_start, kv_length = _block(kv_offsets, tl.load(kv_list + entry))
        kv_rows = (step - entry * KV_PIECES) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = _load(k, k_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)
        v_tile = _load(v, v_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)
        bias = tl.where(kv_rows < kv_length, 0.0, float("-inf"))
        scores = _dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E) + bias[None, :]
        p = tl.exp2(scores - row_lse[:, None])
        dp = _dot(do_tile, tl.trans(v_tile))
        ds = p * (dp - row_delta[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    _store(dq, dq_strides, batch, head, q_start, q_length, q_rows, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_blocks", "list_width", "seq_q"])
def _dkv_kernel(
    q, k, v, do, dk, dv, lse, delta,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    q_offsets, kv_offsets, q_starts, q_indices,
    plan_steps, num_kv_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
):  # fmt: skip
    kv_block = tl.program_id(0) // KV_PIECES
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_start, kv_length = _block(kv_offsets, kv_block)
    kv_rows = (tl.program_id(0) % KV_PIECES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = _load(k, k_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)
    v_tile = _load(v, v_strides, batch, kv_head, kv_start, kv_length, kv_rows, HEAD_DIM, BLOCK_D)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row_head = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * seq_q
        plan_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64)
        starts = q_starts + plan_row * (num_kv_blocks + 1) + kv_block
        q_list = q_indices + plan_row * list_width
        for step in range(tl.load(starts) * Q_PIECES, tl.load(starts + 1) * Q_PIECES):
            entry = step // Q_PIECES
            q_start, q_length = _block(q_offsets, tl.load(q_list + entry))
            q_rows = (step - entry * Q_PIECES) * BLOCK_M + tl.arange(0, BLOCK_M)
            q_tile = _load(q, q_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)
            do_tile = _load(do, do_strides, batch, head, q_start, q_length, q_rows, HEAD_DIM, BLOCK_D)
            row = row_head + q_start + tl.minimum(q_rows, q_length - 1)
            bias = tl.where(q_rows < q_length, tl.load(lse + row) * -LOG2_E, float("-inf"))
            row_delta = tl.load(delta + row)
            # Transposed, [BLOCK_N, BLOCK_M]: the weights are then the left operand of both products below.
            scores = _dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E) + bias[None, :]
            p = tl.exp2(scores)
            dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
            dp = _dot(v_tile, tl.trans(do_tile))
            ds = p * (dp - row_delta[None, :])
            dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    _store(dk, dk_strides, batch, kv_head, kv_start, kv_length, kv_rows, dk_acc * scale, HEAD_DIM, BLOCK_D)
    _store(dv, dv_strides, batch, kv_head, kv_start, kv_length, kv_rows, dv_acc, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True)
class _Launch:
    """How one kernel is launched: the largest BLOCK_M and BLOCK_N, warps per program, depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel, then by (bytes per element, head_dim rounded up to a power of two, at least 64).
# Two bytes: 64 x 64 is what one group of four warps multiplies in one Hopper instruction; larger tiles were no faster
# on an H100. Four bytes: exact fp32 products run outside the tensor cores and live in registers, hence small tiles.
# Shared memory stays below 99 KiB on sm_86, sm_89 and sm_120, and registers spill nowhere or by some 300 bytes.
_LAUNCHES = {
    "forward": {
        (2, 64): _Launch(64, 64, 4, 3),
        (2, 128): _Launch(64, 64, 4, 3),
        (2, 256): _Launch(64, 32, 4, 2),
        (4, 64): _Launch(32, 32, 4, 2),
        (4, 128): _Launch(32, 32, 8, 2),
        (4, 256): _Launch(32, 16, 8, 1),
    },
    "dq": {
        (2, 64): _Launch(64, 64, 4, 3),
        (2, 128): _Launch(64, 64, 4, 2),
        (2, 256): _Launch(64, 32, 4, 1),
        (4, 64): _Launch(32, 32, 4, 2),
        (4, 128): _Launch(32, 32, 8, 1),
        (4, 256): _Launch(16, 16, 8, 1),
    },
    "dkv": {
        (2, 64): _Launch(64, 64, 4, 3),
        (2, 128): _Launch(32, 64, 4, 3),
        (2, 256): _Launch(32, 32, 8, 1),
        (4, 64): _Launch(32, 32, 8, 1),
        (4, 128): _Launch(16, 16, 4, 1),
        (4, 256): _Launch(16, 16, 8, 1),
    },
}


def _options(kernel: str, q: Tensor, k: Tensor, plan: PlanTensors) -> dict[str, Any]:
    """The compile-time arguments of one kernel."""
    head_dim = q.shape[-1]
    block_d = max(32, triton.next_power_of_2(head_dim))
    launch = _LAUNCHES[kernel][q.element_size(), max(64, block_d)]
    block_m = min(launch.block_m, max(16, triton.next_power_of_2(plan.max_q_block)))
    block_n = min(launch.block_n, max(16, triton.next_power_of_2(plan.max_kv_block)))
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "Q_PIECES": triton.cdiv(plan.max_q_block, block_m),
        "KV_PIECES": triton.cdiv(plan.max_kv_block, block_n),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,  # makes scale and bias of a score one instruction; off by default from Triton 3.10
    }


def _addressable(x: Tensor) -> Tensor:
    """x itself, or a copy if its strides are beyond the kernels: they read head_dim contiguously, and within a block
    they add 32-bit offsets, so 128 token strides must stay below 2**31."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _plan_steps(plan: PlanTensors) -> tuple[int, int]:
    """How far one step of batch and one of head move through the lists, in lists of one head; 0 where broadcast."""
    batches, heads = plan.kv_num_blocks.shape[:2]
    return (heads if batches > 1 else 0, 1 if heads > 1 else 0)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query block over the key blocks of its list.

    Shapes: q [B, Sq, H, D], k and v [B, Skv, Hkv, D], any strides; D <= 256 and H a multiple of Hkv. A tensor is
    copied only if its last dimension is not contiguous (or its token stride reaches 2**24 elements).
    Returns out [B, Sq, H, D] in the dtype of q, and lse [B, H, Sq] fp32; 0 and -inf for a row that reads nothing.
    """
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    batch, seq_q, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    num_q_blocks, width = plan.kv_indices.shape[2:]
    options = _options("forward", q, k, plan)
    with torch.cuda.device_of(q):
        _forward_kernel[(num_q_blocks * options["Q_PIECES"], heads, batch)](
            q, k, v, out, lse,
            q.stride(), k.stride(), v.stride(), out.stride(),
            plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks.contiguous(), plan.kv_indices.contiguous(),
            _plan_steps(plan), num_q_blocks, width, seq_q, scale, **options,
        )  # fmt: skip
    return out, lse


def backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: PlanTensors, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`: dq, dk, dv in the dtypes and shapes of q, k, v.

    do [B, Sq, H, D] in the dtype of q; dlse, lse [B, H, Sq] fp32. The plan must carry its transpose. Deterministic.
    """
    q, k, v, out, do = (_addressable(x) for x in (q, k, v, out, do))
    lse, dlse = lse.contiguous(), dlse.contiguous()
    batch, seq_q, heads, _ = q.shape
    kv_heads = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    num_q_blocks, width = plan.kv_indices.shape[2:]
    num_kv_blocks = plan.kv_offsets.numel() - 1
    with torch.cuda.device_of(q):
        options = _options("dq", q, k, plan)
        _dq_kernel[(num_q_blocks * options["Q_PIECES"], heads, batch)](
            q, k, v, out, do, dq, lse, dlse, delta,
            q.stride(), k.stride(), v.stride(), out.stride(), do.stride(), dq.stride(),
            plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks.contiguous(), plan.kv_indices.contiguous(),
            _plan_steps(plan), num_q_blocks, width, seq_q, scale, **options,
        )  # fmt: skip
        options = _options("dkv", q, k, plan)
        _dkv_kernel[(num_kv_blocks * options["KV_PIECES"], kv_heads, batch)](
            q, k, v, do, dk, dv, lse, delta,
            q.stride(), k.stride(), v.stride(), do.stride(), dk.stride(), dv.stride(),
            plan.q_offsets, plan.kv_offsets, plan.q_starts, plan.q_indices,
            _plan_steps(plan), num_kv_blocks, num_q_blocks * width, seq_q, scale, **options,
        )  # fmt: skip
    return dq, dk, dv
