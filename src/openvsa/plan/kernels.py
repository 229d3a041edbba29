"""Triton kernels that build a plan's lists: the best key blocks of each row, and the readers of each key block.

No sorting: both are integer work with one right answer, so they agree bit for bit with the plain code in rank.py and
convert.py, and integer atomics keep them deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["top_blocks", "transpose_lists"]

MAX_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
_FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not said, and 3.10 takes False


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "keep_first", "first_row"])
def _top_kernel(
    scores, forced, counts, indices, num_q, num_kv, width, keep_first, first_row,
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

    # A threshold that `width` keys reach: bit by bit from the highest, until it separates them from the rest. If ties
    # do not let it, it ends as the width-th largest key itself.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    reach = num_kv
    while (bit != 0) & (reach != width):
        higher = threshold | bit
        at_least = tl.sum((key >= higher).to(tl.int32), 0)
        enough = at_least >= width
        threshold = tl.where(enough, higher, threshold)
        reach = tl.where(enough, at_least, reach)
        bit = bit >> 1

    # All above it, and of those equal to it the first, as many as are still wanted. One scan counts both: of at most
    # 16384 entries, each count fits in half of 32 bits.
    above = (key > threshold).to(tl.int32)
    equal = (key == threshold).to(tl.int32)
    wanted = width - tl.sum(above, 0)
    so_far = tl.cumsum(above + (equal << 16), 0)
    equal_so_far = so_far >> 16
    kept = (above | (equal & (equal_so_far <= wanted).to(tl.int32))) != 0
    place = (so_far & 0xFFFF) + tl.minimum(equal_so_far, wanted) - 1
    tl.store(indices + row * width + place, column, mask=kept)
    tl.store(counts + row, width)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "words"])
def _mark_kernel(counts, indices, table, num_q, num_kv, width, words, BLOCK_K: tl.constexpr):
    head = (tl.program_id(0) // num_q).to(tl.int64)
    row = tl.program_id(0) % num_q
    count = tl.load(counts + head * num_q + row)
    reads = indices + (head * num_q + row) * width
    table += head * num_kv * words
    for first in range(0, count, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        mask = slot < count
        readers = table + tl.load(reads + slot, mask=mask, other=0).to(tl.int64) * words
        # Integers: whatever the order, the result is the same.
        tl.atomic_or(readers + 1 + row // 32, tl.full([BLOCK_K], 1, tl.int32) << (row % 32), mask=mask, sem="relaxed")
        tl.atomic_add(readers, tl.full([BLOCK_K], 1, tl.int32), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_kv", "words"])
def _starts_kernel(table, starts, num_kv, words, BLOCK_C: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    table += head * num_kv * words
    starts += head * (num_kv + 1)
    total = tl.zeros([], tl.int32)
    tl.store(starts, total)
    for first in range(0, num_kv, BLOCK_C):
        key_block = first + tl.arange(0, BLOCK_C)
        count = tl.load(table + key_block.to(tl.int64) * words, mask=key_block < num_kv, other=0)
        tl.store(starts + 1 + key_block, total + tl.cumsum(count, 0), mask=key_block < num_kv)
        total += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "words"])
def _readers_kernel(table, starts, readers, num_q, num_kv, width, words, BLOCK_R: tl.constexpr):
    head = (tl.program_id(0) // num_kv).to(tl.int64)
    key_block = tl.program_id(0) % num_kv
    bits = table + (head * num_kv + key_block) * words + 1
    readers += head * num_q * width
    place = tl.load(starts + head * (num_kv + 1) + key_block)
    for first in range(0, num_q, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        reads = (tl.load(bits + row // 32, mask=row < num_q, other=0) >> (row % 32)) & 1
        tl.store(readers + place + tl.cumsum(reads, 0) - 1, row, mask=reads != 0)
        place += tl.sum(reads, 0)


def _power_of_2(n: int) -> int:
    """The next one. Triton's own function takes the host 6 microseconds."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def top_blocks(
    scores: Tensor, forced: Tensor | None, width: int, keep_first: int, keep_self: bool, first_row: int
) -> tuple[Tensor, Tensor]:
    """int32 [..., NQ], `width` everywhere, and int32 [..., NQ, width], ascending: see `openvsa.plan.rank`.

    scores [..., NQ, NK], forced bool of the same shape. One program a row, which it holds in registers: NK <= 16384.
    Row i has its own block at column first_row + i.
    """
    num_q, num_kv = scores.shape[-2:]
    scores = scores.contiguous()
    counts = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    indices = torch.empty((*scores.shape[:-1], width), dtype=torch.int32, device=scores.device)
    rows = counts.numel()
    if rows:
        block_n = _power_of_2(num_kv)
        options = {**_FUSED, "FORCED": forced is not None, "KEEP_SELF": keep_self, "BLOCK_N": block_n}
        options["num_warps"] = min(max(block_n // 1024, 1), 4)
        with torch.cuda.device_of(scores):
            _top_kernel[(rows,)](
                scores, scores if forced is None else forced.contiguous().view(torch.uint8), counts, indices,
                num_q, num_kv, width, keep_first, first_row, **options,
            )  # fmt: skip
    return counts, indices


def transpose_lists(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """See `openvsa.plan.convert.transpose_lists`; entries of the readers past the last start are not written.

    Each entry sets its row's bit in a table of NK x NQ bits, and each key block then lists its bits in order.
    """
    counts, indices = counts.contiguous(), indices.contiguous()
    num_q, width = indices.shape[-2:]
    lead = counts.shape[:-1]
    words = 1 + -(-num_q // 32)  # of a key block: how many rows read it, then a bit for each row
    table = torch.zeros(*lead, num_kv, words, dtype=torch.int32, device=counts.device)
    starts = torch.empty(*lead, num_kv + 1, dtype=torch.int32, device=counts.device)
    readers = torch.empty(*lead, num_q * width, dtype=torch.int32, device=counts.device)
    heads = lead.numel()
    block_k, block_r = (min(_power_of_2(n), 1024) for n in (width, num_q))
    mark = {**_FUSED, "BLOCK_K": block_k, "num_warps": max(block_k // 256, 1)}
    collect = {**_FUSED, "BLOCK_R": block_r, "num_warps": max(block_r // 512, 1)}
    scan = {**_FUSED, "BLOCK_C": 1024}
    with torch.cuda.device_of(counts):
        # All in the first dimension of the grid: the others end at 65,535.
        _mark_kernel[(num_q * heads,)](counts, indices, table, num_q, num_kv, width, words, **mark)
        _starts_kernel[(heads,)](table, starts, num_kv, words, **scan)
        _readers_kernel[(num_kv * heads,)](table, starts, readers, num_q, num_kv, width, words, **collect)
    return starts, readers
