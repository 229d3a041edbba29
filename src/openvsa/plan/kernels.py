"""Triton kernels that build a plan's lists: the best key blocks of each row, and the readers of each key block.

No sorting and no atomics: both are integer work with one right answer, so they agree bit for bit with the plain code
in rank.py and convert.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["top_blocks", "transpose_lists"]

MAX_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "keep_first", "first_row"])
def _top_kernel(
    scores, forced, indices, num_q, num_kv, width, keep_first, first_row,
    FORCED: tl.constexpr, KEEP_SELF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    inside = column < num_kv
    score = tl.load(scores + row * num_kv + column, mask=inside, other=0.0).to(tl.float32)
    number = tl.minimum(tl.maximum(score, -MAX_FLOAT), MAX_FLOAT)
    score = tl.where(score == score, number, float("-inf"))  # NaN below every number
    score = tl.where(score == 0.0, 0.0, score)  # -0 ties with 0
    # Unsigned integers that sort like the scores: forced blocks above all, slots past the end (0) below.
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
    must = column < keep_first
    if KEEP_SELF:
        must = must | (column == first_row + tl.program_id(0) % num_q)
    if FORCED:
        must = must | (tl.load(forced + row * num_kv + column, mask=inside, other=0) != 0)
    key = tl.where(must, -1, key.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)
    key = tl.where(inside, key, 0).to(tl.uint32)

    # The width-th largest key, from its highest bit down.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        at_least = tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(at_least >= width, higher, threshold)
        bit = bit >> 1

    # All above it, and of those equal to it the first, as many as are still wanted. One scan counts both: of at most
    # 16384 entries, each count fits in half of 32 bits.
    above = (key > threshold).to(tl.int32)
    equal = (key == threshold).to(tl.int32)
    wanted = width - tl.sum(above, 0)
    counts = tl.cumsum(above + (equal << 16), 0)
    equal_so_far = counts >> 16
    kept = (above | (equal & (equal_so_far <= wanted).to(tl.int32))) != 0
    place = (counts & 0xFFFF) + tl.minimum(equal_so_far, wanted) - 1
    tl.store(indices + row * width + place, column, mask=kept)


@triton.jit
def _reads(counts, indices, row, key_block, num_q, width, steps):
    """Whether each row [R, 1] reads each key block [1, C], by bisection of the row's ascending list: [R, C] of 0, 1."""
    real = row < num_q
    end = tl.load(counts + row, mask=real, other=0) + tl.zeros_like(key_block)
    lists = indices + row.to(tl.int64) * width + tl.zeros_like(key_block)
    low = tl.zeros_like(end)
    high = end
    for _ in range(steps):
        middle = (low + high) >> 1
        open_ = low < high
        before = tl.load(lists + middle, mask=open_, other=0) < key_block
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    found = tl.load(lists + low, mask=low < end, other=-1)
    return (found == key_block).to(tl.int32)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "steps"])
def _count_kernel(
    counts, indices, readers_per_block, num_q, num_kv, width, steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    key_block = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    counts += head * num_q
    indices += head * num_q * width
    total = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, num_q, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        total += tl.sum(_reads(counts, indices, row[:, None], key_block[None, :], num_q, width, steps), 0)
    tl.store(readers_per_block + head * num_kv + key_block, total, mask=key_block < num_kv)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "steps"])
def _readers_kernel(
    counts, indices, starts, readers, num_q, num_kv, width, steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64)
    key_block = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    counts += head * num_q
    indices += head * num_q * width
    readers += head * num_q * width
    place = tl.load(starts + head * (num_kv + 1) + key_block, mask=key_block < num_kv, other=0)
    for first in range(0, num_q, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        reads = _reads(counts, indices, row[:, None], key_block[None, :], num_q, width, steps)
        at = place[None, :] + tl.cumsum(reads, 0) - 1
        tl.store(readers + at, row[:, None] + tl.zeros_like(at), mask=reads != 0)
        place += tl.sum(reads, 0)


def top_blocks(
    scores: Tensor, forced: Tensor | None, width: int, keep_first: int, keep_self: bool, first_row: int
) -> Tensor:
    """int32 [..., NQ, width], ascending: see `openvsa.plan.rank`. scores [..., NQ, NK], forced bool of the same shape.

    One program a row, which it holds in registers: NK <= 16384. Row i has its own block at column first_row + i.
    """
    num_q, num_kv = scores.shape[-2:]
    scores = scores.contiguous()
    indices = torch.empty(*scores.shape[:-1], width, dtype=torch.int32, device=scores.device)
    rows = indices.numel() // max(width, 1)
    if rows:
        block_n = triton.next_power_of_2(num_kv)
        options: dict[str, Any] = {"FORCED": forced is not None, "KEEP_SELF": keep_self, "BLOCK_N": block_n}
        options["num_warps"] = min(max(block_n // 1024, 1), 8)
        with torch.cuda.device_of(scores):
            _top_kernel[(rows,)](
                scores, scores if forced is None else forced.contiguous().view(torch.uint8), indices,
                num_q, num_kv, width, keep_first, first_row, **options,
            )  # fmt: skip
    return indices


def transpose_lists(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """See `openvsa.plan.convert.transpose_lists`; entries of the readers past the last start are not written.

    A program owns a few key blocks, asks every row whether it reads them (a row's list ascends: bisection), and adds
    the rows in order; a first pass counts. Work NQ * NK * log K, no memory beyond the result.
    """
    counts, indices = counts.contiguous(), indices.contiguous()
    num_q, width = indices.shape[-2:]
    lead = counts.shape[:-1]
    per_block = torch.empty(*lead, num_kv, dtype=torch.int32, device=counts.device)
    readers = torch.empty(*lead, num_q * width, dtype=torch.int32, device=counts.device)
    block_r = min(max(triton.next_power_of_2(num_q), 2), 128)
    grid = (triton.cdiv(num_kv, 16), lead.numel())
    options: dict[str, Any] = {"BLOCK_R": block_r, "BLOCK_C": 16, "num_warps": 8}
    with torch.cuda.device_of(counts):
        _count_kernel[grid](counts, indices, per_block, num_q, num_kv, width, width.bit_length(), **options)
        starts = torch.nn.functional.pad(per_block.cumsum(-1, dtype=torch.int32), (1, 0))
        _readers_kernel[grid](counts, indices, starts, readers, num_q, num_kv, width, width.bit_length(), **options)
    return starts, readers
