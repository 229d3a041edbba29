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
FOUR_OCTAVES = tl.constexpr(4 << 23)  # between a float and a sixteenth of it, as integers
_FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not said, and 3.10 takes False


@triton.jit
def _keys(scores, forced, column, num_kv, keep_first, own, FORCED: tl.constexpr, KEEP_SELF: tl.constexpr):
    """Integers that sort like the scores of a row: forced blocks above all, slots past its end below."""
    inside = column < num_kv
    score = tl.load(scores + column, mask=inside, other=0.0).to(tl.float32)
    number = tl.minimum(tl.maximum(score, -MAX_FLOAT), MAX_FLOAT) + 0.0  # -0 ties with 0
    score = tl.where(score == score, number, float("-inf"))  # NaN below every number
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    must = column < keep_first
    if KEEP_SELF:
        must = must | (column == own)
    if FORCED:
        must = must | (tl.load(forced + column, mask=inside, other=0) != 0)
    return tl.where(inside, tl.where(must, 0x7FFFFFFF, key), -0x80000000)


@triton.jit
def _count(key, threshold):
    return tl.sum((key >= threshold).to(tl.int32), 0)


@triton.jit
def _tell(key, threshold):
    """1 above the threshold, 1 << 16 where equal to it. A sum counts both: of at most 16384 keys, each fits in half."""
    return (key > threshold).to(tl.int32) + ((key == threshold).to(tl.int32) << 16)


@triton.jit
def _store_kept(indices, column, told, before, every, width):
    """All above the threshold, and of those equal to it the first, as many as `width` still wants. `before`: what the
    columns before these sum up to; `every`: what all do."""
    wanted = width - (every & 0xFFFF)
    so_far = before + tl.cumsum(told, 0)
    equal_so_far = so_far >> 16
    kept = (told == 1) | ((told > 1) & (equal_so_far <= wanted))
    place = (so_far & 0xFFFF) + tl.minimum(equal_so_far, wanted) - 1
    tl.store(indices + place, column, mask=kept)


@triton.jit(do_not_specialize=["num_q", "num_kv", "width", "keep_first", "first_row"])
def _top_kernel(
    scores, forced, counts, indices, pitch, num_q, num_kv, width, keep_first, first_row,
    FORCED: tl.constexpr, KEEP_SELF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = first_row + tl.program_id(0) % num_q
    scores += row * pitch
    forced += row * num_kv
    # A row in two pieces: one of the next power of 2 would be a quarter empty on average.
    column = tl.arange(0, BLOCK_N)
    key = _keys(scores, forced, column, num_kv, keep_first, own, FORCED, KEEP_SELF)
    if BLOCK_REST:
        rest = BLOCK_N + tl.arange(0, BLOCK_REST)
        rest_key = _keys(scores, forced, rest, num_kv, keep_first, own, FORCED, KEEP_SELF)

    # A threshold that `width` keys reach and no more, or, where ties do not let it, the width-th largest key itself. It
    # is looked for by halves: first from a sixteenth of the best score on, then above or below that.
    threshold = tl.full([], -0x80000000, tl.int32)
    most = tl.max(key, 0)
    if BLOCK_REST:
        most = tl.maximum(most, tl.max(rest_key, 0))
    higher = tl.where(most >= threshold + FOUR_OCTAVES, most - FOUR_OCTAVES, most)
    reach = num_kv
    while (threshold < most) & (reach != width):
        at_least = _count(key, higher)
        if BLOCK_REST:
            at_least += _count(rest_key, higher)
        enough = at_least >= width
        threshold = tl.where(enough, higher, threshold)
        reach = tl.where(enough, at_least, reach)
        most = tl.where(enough, most, higher - 1)
        apart = (most - threshold).to(tl.uint32, bitcast=True)  # may be more than 2**31
        higher = threshold + ((apart + 1) >> 1).to(tl.int32, bitcast=True)

    told = _tell(key, threshold)
    total = tl.sum(told, 0)
    every = total
    if BLOCK_REST:
        rest_told = _tell(rest_key, threshold)
        every = total + tl.sum(rest_told, 0)
    indices += row * width
    _store_kept(indices, column, told, 0, every, width)
    if BLOCK_REST:
        _store_kept(indices, rest, rest_told, total, every, width)
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


def _pieces(n: int) -> tuple[int, int]:
    """Powers of 2 that hold a row of n together: one, or a large and a small one where that is less."""
    whole = _power_of_2(n)
    half = whole // 2
    rest = max(_power_of_2(n - half), half // 4)  # not all there are: each is a kernel to compile
    return (half, rest) if half >= 64 and rest < half else (whole, 0)


def top_blocks(
    scores: Tensor, forced: Tensor | None, width: int, keep_first: int, keep_self: bool, first_row: int
) -> tuple[Tensor, Tensor]:
    """int32 [..., NQ], `width` everywhere, and int32 [..., NQ, width], ascending: see `openvsa.plan.rank`.

    scores [..., NQ, NK], forced bool of the same shape. One program a row, which it holds in registers: NK <= 16384.
    Row i has its own block at column first_row + i.
    """
    num_q, num_kv = scores.shape[-2:]
    flat = scores.reshape(-1, num_kv)  # of rows at one distance, which may be wider than they are
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    counts = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    indices = torch.empty((*scores.shape[:-1], width), dtype=torch.int32, device=scores.device)
    rows = counts.numel()
    if rows:
        block, rest = _pieces(num_kv)
        options = {**_FUSED, "FORCED": forced is not None, "KEEP_SELF": keep_self, "BLOCK_N": block, "BLOCK_REST": rest}
        size = block + rest
        options["num_warps"] = 1 if size < 2048 else 4
        with torch.cuda.device_of(scores):
            _top_kernel[(rows,)](
                flat, flat if forced is None else forced.contiguous().view(torch.uint8), counts, indices,
                flat.stride(0), num_q, num_kv, width, keep_first, first_row, **options,
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
