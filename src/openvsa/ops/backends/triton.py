"""The Triton backend: block-sparse attention forward and backward on GPUs with tensor cores.

Three kernels, none with atomics, so results repeat bit for bit:
  forward   one program per query block and head walks the list of key blocks with an online softmax
            (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691);
  dq        the same walk, recomputing the weights from lse; it also leaves the row term `delta` for the third kernel;
  dkv       one program per key block and key head walks the query blocks that read it, over its group of query heads.
Seven matrix products for a pair of blocks backward, where one kernel that adds to dq with atomics needs five: on an
H200 that one took 7.2 ms where these two take 4.9 (B=1 H=12 S=32768 D=128, one eighth of the blocks).

Blocks are contiguous runs of tokens of any length from 1 to 128. A kernel walks blocks in pieces of at most
BLOCK_M query rows and BLOCK_N key rows, and reads the pieces that it walks over in one of two ways:
  pointers  rows of a piece past the end of its block repeat the last token of the block: nothing outside the block
            is ever read, loads of rows need no mask, and the weights of those rows are set to 0;
  maps      where all blocks are equally long and the GPU has a tensor memory accelerator (sm_90 and newer), tensor
            maps load whole pieces: no addresses, no masks, a third fewer registers.

Scores are kept in units of log2 inside the kernels (exp2 is the native instruction); lse leaves in natural log.
The scale multiplies the fp32 product: folding it into bf16 keys would round it.

Numbers that change from call to call (blocks, list width, tokens) are not specialised on, so that a new density or
length compiles nothing again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from openvsa.ops.plan_tensors import PlanTensors

__all__ = ["backward_kv", "backward_q", "forward", "row_terms"]

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
def _load(
    x, strides, batch, head, start, length, row, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Tokens start + row + (0 .. ROWS) and dimensions column + (0 .. COLUMNS) of one head, [ROWS, COLUMNS]. Rows past
    the end of the block repeat its last token; dimensions past HEAD_DIM are 0."""
    dims = column + tl.arange(0, COLUMNS)
    inside = tl.minimum(row + tl.arange(0, ROWS), length - 1)
    pointers = _first(x, strides, batch, head, start) + inside[:, None] * strides[1] + dims[None, :]
    if HEAD_DIM % COLUMNS == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def _load_piece(
    x, x_map, strides, batch, head, start, length, row, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """The same by a tensor map, or by pointers."""
    if MAPPED:
        tile = x_map.load([batch, head, start + row, column]).reshape(ROWS, COLUMNS)
    else:
        tile = _load(x, strides, batch, head, start, length, row, column, ROWS, COLUMNS, HEAD_DIM)
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


@triton.jit
def _block_walked(offsets, index, LENGTH: tl.constexpr, MAPPED: tl.constexpr):
    """The same. Mapped blocks are equally long, LENGTH tokens."""
    if MAPPED:
        start = index * LENGTH
        length = LENGTH
    else:
        start, length = _block(offsets, index)
    return start, length


@triton.jit
def _in_registers(x, WIDTH: tl.constexpr):
    """x, [rows, WIDTH], in the registers where Hopper's product leaves its result, which are also those where it takes
    a left operand from. Nothing but a product puts it there, so x goes through one with the identity, exactly."""
    if not INTERPRETED:
        d = tl.arange(0, WIDTH)
        x = _dot(x, tl.where(d[:, None] == d[None, :], 1.0, 0.0).to(x.dtype)).to(x.dtype)
    return x


@triton.jit
def _renewed(x, index):
    """x, made again from itself and the index of a block, which is not negative, though no compiler knows.
    ptxas (of CUDA 12.8, with Triton 3.6) lets a loop overwrite the registers of a left operand that stays the same in
    every round (seen in its machine code, and in wrong results at head_dim 64), so it must not look the same."""
    return (x.to(tl.int16, bitcast=True) ^ (index >> 31).to(tl.int16)).to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["num_q_blocks", "list_width", "seq_q"])
def _forward_kernel(
    q, k, v, k_map, v_map, out, lse,
    q_strides, k_strides, v_strides, out_strides,
    q_offsets, kv_offsets, kv_num_blocks, kv_indices,
    plan_steps, num_q_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
    HALF_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // Q_PIECES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    q_start, q_length = _block(q_offsets, q_block)
    q_row = (tl.program_id(0) % Q_PIECES) * BLOCK_M
    list_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64) * num_q_blocks + q_block
    count = tl.load(kv_num_blocks + list_row)
    kv_list = kv_indices + list_row * list_width

    kv_head = head // GROUP
    HALF: tl.constexpr = BLOCK_D // 2
    if HALF_IN_REGISTERS:
        q_lo = _load(q, q_strides, batch, head, q_start, q_length, q_row, 0, BLOCK_M, HALF, HEAD_DIM)
        q_hi = _load(q, q_strides, batch, head, q_start, q_length, q_row, HALF, BLOCK_M, HALF, HEAD_DIM)
        q_lo = _in_registers(q_lo, HALF)
    else:
        q_tile = _load(q, q_strides, batch, head, q_start, q_length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM)

    score_scale = scale * LOG2_E
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(count * KV_PIECES):
        entry = step // KV_PIECES
        kv_row = (step - entry * KV_PIECES) * BLOCK_N
        index = tl.load(kv_list + entry)
        start, length = _block_walked(kv_offsets, index, KV_PIECES * BLOCK_N, MAPPED)
        if HALF_IN_REGISTERS:
            k_lo = _load_piece(
                k, k_map, k_strides, batch, kv_head, start, length, kv_row, 0, BLOCK_N, HALF, HEAD_DIM, MAPPED
            )
            k_hi = _load_piece(
                k, k_map, k_strides, batch, kv_head, start, length, kv_row, HALF, BLOCK_N, HALF, HEAD_DIM, MAPPED
            )
            scores = _dot(_renewed(q_lo, index), tl.trans(k_lo))
            scores = _dot(q_hi, tl.trans(k_hi), scores)
        else:
            k_tile = _load_piece(
                k, k_map, k_strides, batch, kv_head, start, length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM, MAPPED
            )
            scores = _dot(q_tile, tl.trans(k_tile))

        # The scale is positive, and a repeated last token does not change a maximum.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
        shrink = tl.exp2(row_max - new_max)
        p = tl.exp2(scores * score_scale - new_max[:, None])
        if not MAPPED:  # noqa: SIM102, one is for the compiler, one for the GPU
            if length < kv_row + BLOCK_N:
                p = tl.where((kv_row + tl.arange(0, BLOCK_N) < length)[None, :], p, 0.0)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v_tile = _load_piece(
            v, v_map, v_strides, batch, kv_head, start, length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM, MAPPED
        )
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        row_max = new_max

    # A row that read nothing has row_sum 0 and row_max -inf: dividing by 1 gives out 0 and lse -inf.
    q_rows = q_row + tl.arange(0, BLOCK_M)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    _store(out, out_strides, batch, head, q_start, q_length, q_rows, acc, HEAD_DIM, BLOCK_D)
    lse_head = lse + (batch * tl.num_programs(1) + head).to(tl.int64) * seq_q
    tl.store(lse_head + q_start + q_rows, (row_max + tl.log2(row_sum)) * LN_2, mask=q_rows < q_length)


@triton.jit(do_not_specialize=["num_q_blocks", "list_width", "seq_q"])
def _dq_kernel(
    q, k, v, k_map, v_map, out, do, dq, lse, dlse, delta,
    q_strides, k_strides, v_strides, out_strides, do_strides, dq_strides,
    q_offsets, kv_offsets, kv_num_blocks, kv_indices,
    plan_steps, num_q_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // Q_PIECES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    q_start, q_length = _block(q_offsets, q_block)
    q_row = (tl.program_id(0) % Q_PIECES) * BLOCK_M
    q_rows = q_row + tl.arange(0, BLOCK_M)
    list_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64) * num_q_blocks + q_block
    count = tl.load(kv_num_blocks + list_row)
    kv_list = kv_indices + list_row * list_width

    kv_head = head // GROUP
    q_tile = _load(q, q_strides, batch, head, q_start, q_length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM)
    do_tile = _load(do, do_strides, batch, head, q_start, q_length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM)
    out_tile = _load(out, out_strides, batch, head, q_start, q_length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM)

    # d loss / d score = p * (dp - sum(do * out) + dlse); the last two depend on the row alone.
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * seq_q + q_start + tl.minimum(q_rows, q_length - 1)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1) - tl.load(dlse + row)
    tl.store(delta + row, row_delta, mask=q_rows < q_length)
    row_lse = tl.load(lse + row) * LOG2_E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(count * KV_PIECES):
        entry = step // KV_PIECES
        kv_row = (step - entry * KV_PIECES) * BLOCK_N
        start, length = _block_walked(kv_offsets, tl.load(kv_list + entry), KV_PIECES * BLOCK_N, MAPPED)
        k_tile = _load_piece(
            k, k_map, k_strides, batch, kv_head, start, length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM, MAPPED
        )
        v_tile = _load_piece(
            v, v_map, v_strides, batch, kv_head, start, length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM, MAPPED
        )
        p = tl.exp2(_dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E) - row_lse[:, None])
        if not MAPPED:  # noqa: SIM102, one is for the compiler, one for the GPU
            if length < kv_row + BLOCK_N:
                p = tl.where((kv_row + tl.arange(0, BLOCK_N) < length)[None, :], p, 0.0)
        dp = _dot(do_tile, tl.trans(v_tile))
        ds = p * (dp - row_delta[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)

    _store(dq, dq_strides, batch, head, q_start, q_length, q_rows, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_kv_blocks", "list_width", "seq_q"])
def _dkv_kernel(
    q, k, v, do, q_map, do_map, dk, dv, lse, delta,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    q_offsets, kv_offsets, q_starts, q_indices,
    plan_steps, num_kv_blocks, list_width, seq_q, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PIECES: tl.constexpr, KV_PIECES: tl.constexpr,
):  # fmt: skip
    kv_block = tl.program_id(0) // KV_PIECES
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_start, kv_length = _block(kv_offsets, kv_block)
    kv_row = (tl.program_id(0) % KV_PIECES) * BLOCK_N
    k_tile = _load(k, k_strides, batch, kv_head, kv_start, kv_length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM)
    v_tile = _load(v, v_strides, batch, kv_head, kv_start, kv_length, kv_row, 0, BLOCK_N, BLOCK_D, HEAD_DIM)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row_head = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * seq_q
        plan_row = (batch * plan_steps[0] + head * plan_steps[1]).to(tl.int64)
        starts = q_starts + plan_row * (num_kv_blocks + 1) + kv_block
        first = tl.load(starts)
        q_list = q_indices + plan_row * list_width + first
        for step in range((tl.load(starts + 1) - first) * Q_PIECES):
            entry = step // Q_PIECES
            q_row = (step - entry * Q_PIECES) * BLOCK_M
            start, length = _block_walked(q_offsets, tl.load(q_list + entry), Q_PIECES * BLOCK_M, MAPPED)
            q_tile = _load_piece(
                q, q_map, q_strides, batch, head, start, length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM, MAPPED
            )
            do_tile = _load_piece(
                do, do_map, do_strides, batch, head, start, length, q_row, 0, BLOCK_M, BLOCK_D, HEAD_DIM, MAPPED
            )
            q_rows = q_row + tl.arange(0, BLOCK_M)
            row = row_head + start + tl.minimum(q_rows, length - 1)
            bias = tl.load(lse + row) * -LOG2_E
            if not MAPPED:
                bias = tl.where(q_rows < length, bias, float("-inf"))
            row_delta = tl.load(delta + row)
            # Transposed, [BLOCK_N, BLOCK_M]: the weights are then the left operand of both products below.
            scores = _dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E) + bias[None, :]
            p = tl.exp2(scores)
            dv_acc = _dot(p.to(do_tile.dtype), do_tile, dv_acc)
            dp = _dot(v_tile, tl.trans(do_tile))
            ds = p * (dp - row_delta[None, :])
            dk_acc = _dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    kv_rows = kv_row + tl.arange(0, BLOCK_N)
    _store(dk, dk_strides, batch, kv_head, kv_start, kv_length, kv_rows, dk_acc * scale, HEAD_DIM, BLOCK_D)
    _store(dv, dv_strides, batch, kv_head, kv_start, kv_length, kv_rows, dv_acc, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True)
class _Launch:
    """How one kernel is launched: the largest BLOCK_M and BLOCK_N, warps per program, depth of the load pipeline; on
    Hopper, whether half of a query tile stays in registers, and how many registers a thread may have."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    half_in_registers: bool = False
    max_registers: int | None = None


# By kernel, then by (bytes per element, head_dim rounded up to a power of two, at least 64). Frozen: nothing is tuned
# when the op runs, and no entry depends on lengths or densities.
#
# Pieces are read by pointers, on every GPU. Two bytes: 64 x 64 is what one group of four warps multiplies in one
# Hopper instruction. Four bytes: exact fp32 products run outside the tensor cores and live in registers, hence small
# tiles. Two bytes up to head_dim 128 are measured, on an H200; all else, and all other GPUs, are derived: compiled for
# sm_80, sm_89, sm_90 and sm_120, shared memory stays below the 99 KiB that sm_86, sm_89 and sm_120 have, for gfx942
# below 40 of its 64 KiB, and registers spill by no more than some 300 bytes (fp32) or 40 (else).
_BY_POINTERS = {
    "forward": {
        (2, 64): _Launch(64, 64, 4, 2),
        (2, 128): _Launch(64, 64, 4, 2),
        (2, 256): _Launch(64, 32, 4, 2),
        (4, 64): _Launch(32, 32, 4, 2),
        (4, 128): _Launch(32, 32, 8, 2),
        (4, 256): _Launch(32, 16, 8, 1),
    },
    "dq": {
        (2, 64): _Launch(64, 64, 4, 2),
        (2, 128): _Launch(64, 64, 4, 2),
        (2, 256): _Launch(64, 32, 4, 1),
        (4, 64): _Launch(32, 32, 4, 2),
        (4, 128): _Launch(32, 32, 8, 1),
        (4, 256): _Launch(16, 16, 8, 1),
    },
    "dkv": {
        (2, 64): _Launch(64, 64, 4, 3),
        (2, 128): _Launch(64, 64, 4, 2),
        (2, 256): _Launch(32, 32, 8, 1),
        (4, 64): _Launch(32, 32, 8, 1),
        (4, 128): _Launch(16, 16, 4, 1),
        (4, 256): _Launch(16, 16, 8, 1),
    },
}

# Pieces are loaded by tensor maps. Measured on an H200; TFLOP/s of the products that each kernel makes, B=1 H=12
# S=32768, one eighth of the blocks, random: forward 541 and 449 (head_dim 128 and 64), dq 636 and 642, dkv 612 and 486.
# The kernels before them, which read by pointers with a bias on every score: 390 and 356, 518 and 469, 388 and 372.
# Those are short runs; a GPU that has been busy for half a minute gives some 5 % less. What did not pay: 128 queries in
# a program (397 forward, blocks of 128), eight warps for 64, a third stage, key blocks with most readers first.
_BY_MAPS = {
    "forward": {(2, 64): _Launch(64, 64, 4, 2), (2, 128): _Launch(64, 64, 4, 2)},
    "dq": {(2, 64): _Launch(64, 64, 4, 2), (2, 128): _Launch(64, 64, 4, 2)},
    "dkv": {(2, 64): _Launch(32, 64, 4, 3), (2, 128): _Launch(64, 64, 4, 2)},
}

# Forward at head_dim 128 on Hopper: two stages of keys and values and a whole query tile are 80 KiB of shared memory,
# which two programs on a multiprocessor can have; with half of the queries in registers three can, if they keep to 168
# registers each, and reads of shared memory no longer slow the first product (541 against 461 TFLOP/s by maps, 464
# against 408 by pointers).
_HOPPER_FORWARD = _Launch(64, 64, 4, 2, half_in_registers=True, max_registers=168)


def _generation(x: Tensor) -> int | None:
    """The major compute capability of an NVIDIA GPU, None for others. The interpreter passes for a Hopper."""
    if x.device.type == "cpu":
        return 9
    return _major(x.device.index) if torch.version.hip is None else None


@cache  # asked several times in every call
def _major(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _power_of_2(n: int) -> int:
    """The next one. Triton's own function takes the host 6 microseconds."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def _options(kernel: str, q: Tensor, k: Tensor, plan: PlanTensors, read: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The compile-time arguments of one kernel, which walks over blocks of the tensors `read`."""
    head_dim = q.shape[-1]
    block_d = max(32, _power_of_2(head_dim))
    shape = q.element_size(), max(64, block_d)
    if kernel == "dkv":
        length, blocks = plan.max_q_block, plan.q_offsets.numel() - 1
    else:
        length, blocks = plan.max_kv_block, plan.kv_offsets.numel() - 1
    # Blocks whose longest, repeated, gives all tokens are all equal. Pieces are at least 16 rows and powers of two.
    equal = blocks * length == read[0].shape[1] and length in (16, 32, 64, 128)
    mapped = equal and shape in _BY_MAPS[kernel] and all(_mappable(x) for x in read)
    launch = (_BY_MAPS if mapped else _BY_POINTERS)[kernel][shape]
    if kernel == "forward" and shape == (2, 128) and _generation(q) == 9:
        launch = _HOPPER_FORWARD
    block_m = min(launch.block_m, max(16, _power_of_2(plan.max_q_block)))
    block_n = min(launch.block_n, max(16, _power_of_2(plan.max_kv_block)))
    options = {
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "MAPPED": mapped,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "Q_PIECES": -(-plan.max_q_block // block_m),
        "KV_PIECES": -(-plan.max_kv_block // block_n),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,  # makes scale and bias of a score one instruction; off by default from Triton 3.10
    }
    if kernel == "forward":
        options["HALF_IN_REGISTERS"] = launch.half_in_registers
    if launch.max_registers is not None:
        options["maxnreg"] = launch.max_registers
    return options


def _mappable(x: Tensor) -> bool:
    """Whether a tensor map can describe x: on sm_90 and sm_100, in steps of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return aligned and _generation(x) in (9, 10)


def _maps(read: tuple[Tensor, Tensor], rows: int, columns: tuple[int, int], mapped: bool) -> list[Any]:
    """Tensor maps of x [B, S, H, D] as [B, H, S, D] in boxes of [1, 1, rows, columns], or None for pointers."""
    if not mapped:
        return [None, None]
    maps = []
    for x, width in zip(read, columns, strict=True):
        heads_first = x.transpose(1, 2)
        # The step of a dimension of one element means nothing in torch, but a map wants one that is a multiple of 16.
        steps = [step if size > 1 else 16 for size, step in zip(heads_first.shape, heads_first.stride(), strict=True)]
        maps.append(TensorDescriptor(x, list(heads_first.shape), [*steps[:3], 1], [1, 1, rows, width]))
    return maps


def _addressable(x: Tensor) -> Tensor:
    """x itself, or a copy if its strides are beyond the kernels: they read head_dim contiguously, and within a block
    they add 32-bit offsets, so 128 token strides must stay below 2**31."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _steps(lists: Tensor) -> tuple[int, int]:
    """How far one step of batch and one of head move through [Bp, Hp, ...], in lists of one head; 0 where broadcast."""
    batches, heads = lists.shape[:2]
    return (heads if batches > 1 else 0, 1 if heads > 1 else 0)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query block over the key blocks of its list.

    Shapes: q [B, Sq, H, D], k and v [B, Skv, Hkv, D], any strides; D <= 256 and H a multiple of Hkv. A tensor is
    copied only if its last dimension is not contiguous (or its token stride reaches 2**24 elements). The scale is
    positive.
    Returns out [B, Sq, H, D] in the dtype of q, and lse [B, H, Sq] fp32; 0 and -inf for a row that reads nothing.
    """
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    batch, seq_q, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    num_q_blocks, width = plan.kv_indices.shape[2:]
    options = _options("forward", q, k, plan, (k, v))
    block_d = options["BLOCK_D"]
    k_columns = block_d // 2 if options["HALF_IN_REGISTERS"] else block_d
    k_map, v_map = _maps((k, v), options["BLOCK_N"], (k_columns, block_d), options["MAPPED"])
    with torch.cuda.device_of(q):
        _forward_kernel[(num_q_blocks * options["Q_PIECES"], heads, batch)](
            q, k, v, k_map, v_map, out, lse,
            q.stride(), k.stride(), v.stride(), out.stride(),
            plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks.contiguous(), plan.kv_indices.contiguous(),
            _steps(plan.kv_num_blocks), num_q_blocks, width, seq_q, scale, **options,
        )  # fmt: skip
    return out, lse


def row_terms(q: Tensor, plan: PlanTensors) -> Tensor:
    """Room for what `backward_q` leaves for `backward_kv`: `delta` of each query row and head, fp32 [B, H, Sq]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def backward_q(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: PlanTensors, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of q, in its dtype and shape, and the `row_terms`.

    do [B, Sq, H, D] in the dtype of q; dlse, lse [B, H, Sq] fp32. Deterministic, and so is `backward_kv`.
    """
    q, k, v, out, do = (_addressable(x) for x in (q, k, v, out, do))
    lse, dlse = lse.contiguous(), dlse.contiguous()
    batch, seq_q, heads, _ = q.shape
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), row_terms(q, plan)
    num_q_blocks, width = plan.kv_indices.shape[2:]
    options = _options("dq", q, k, plan, (k, v))
    k_map, v_map = _maps((k, v), options["BLOCK_N"], (options["BLOCK_D"],) * 2, options["MAPPED"])
    with torch.cuda.device_of(q):
        _dq_kernel[(num_q_blocks * options["Q_PIECES"], heads, batch)](
            q, k, v, k_map, v_map, out, do, dq, lse, dlse, delta,
            q.stride(), k.stride(), v.stride(), out.stride(), do.stride(), dq.stride(),
            plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks.contiguous(), plan.kv_indices.contiguous(),
            _steps(plan.kv_num_blocks), num_q_blocks, width, seq_q, scale, **options,
        )  # fmt: skip
    return dq, delta


def backward_kv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: PlanTensors, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, in their dtypes and shapes. The plan must carry its transpose."""
    q, k, v, do, lse = _addressable(q), _addressable(k), _addressable(v), _addressable(do), lse.contiguous()
    assert plan.q_starts is not None  # the caller's promise above
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    num_q_blocks, width = plan.kv_indices.shape[2:]
    num_kv_blocks = plan.kv_offsets.numel() - 1
    options = _options("dkv", q, k, plan, (q, do))
    q_map, do_map = _maps((q, do), options["BLOCK_M"], (options["BLOCK_D"],) * 2, options["MAPPED"])
    with torch.cuda.device_of(q):
        _dkv_kernel[(num_kv_blocks * options["KV_PIECES"], k.shape[2], k.shape[0])](
            q, k, v, do, q_map, do_map, dk, dv, lse, delta,
            q.stride(), k.stride(), v.stride(), do.stride(), dk.stride(), dv.stride(),
            plan.q_offsets, plan.kv_offsets, plan.q_starts, plan.q_indices,
            _steps(plan.q_starts), num_kv_blocks, num_q_blocks * width, q.shape[1], scale, **options,
        )  # fmt: skip
    return dk, dv
