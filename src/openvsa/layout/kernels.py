"""Triton kernels that move tokens between raster and block order and reduce or spread rows on the way.

Two kernels, each other's gradient, each of which passes over a tensor once (a permutation on its own is bound by
memory bandwidth, so whatever else is needed of the same tokens rides along):
  gather   tokens of each block into one contiguous run; their mean, or their sum weighted token by token;
  scatter  the run back to where its tokens belong; a row for all tokens of the block added, weighted or not.

Queries, keys and values that are alike go in one launch. One program per block, head, batch entry and tensor. Heads
are the fastest program index: in [B, S, H, D] the heads of a token are neighbours in memory, and so are the tokens of
a tile along the last axis of the lattice. Sums are fp32, in a fixed order, without atomics. Offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather", "scatter", "weighted_sums"]

_NO_STRIDES = (0, 0, 0, 1)  # of a tensor that is not there


@triton.jit
def _at(x, strides, batch, head, dims):
    """Pointers to the first token of one head, [len(dims)]."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2] + dims


@triton.jit(do_not_specialize=["heads", "num_blocks", "seq", "first_row", "num_rows"])
def _gather_kernel(
    x, x1, x2, blocks, blocks1, blocks2, totals, totals1, totals2, weight, rows, weight_grad, index, offsets,
    x_strides, weight_strides, rows_strides, heads, num_blocks, seq, first_row, num_rows,
    WRITE: tl.constexpr, TOTAL: tl.constexpr, WEIGHTED: tl.constexpr, PERMUTED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % num_blocks
    batch = tl.program_id(0) // heads // num_blocks
    if tl.program_id(1) == 1:
        x = x1
        blocks = blocks1
        totals = totals1
    elif tl.program_id(1) == 2:
        x = x2
        blocks = blocks2
        totals = totals2
    start = tl.load(offsets + block)
    length = tl.load(offsets + block + 1) - start
    row = block - first_row
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    in_row = dims < tl.where((row >= 0) & (row < num_rows), HEAD_DIM, 0)  # text blocks have none

    x_head = _at(x, x_strides, batch, head, dims)
    fresh = (batch.to(tl.int64) * seq * heads + head) * HEAD_DIM  # of contiguous [B, S, H, D]
    if WEIGHTED:
        at_row = _at(rows, rows_strides, batch, head, dims) + row.to(tl.int64) * rows_strides[1]
        spread = tl.load(at_row, mask=in_row, other=0.0)
        weight_head = _at(weight, weight_strides, batch, head, dims)
    total = tl.zeros([BLOCK_D], tl.float32)
    for done in range(0, length, BLOCK_L):
        slots = done + tl.arange(0, BLOCK_L)
        inside = slots < length
        mask = inside[:, None] & in_head[None, :]
        target = (start + slots).to(tl.int64)
        source = tl.load(index + target, mask=inside, other=0) if PERMUTED else target
        tokens = tl.load(x_head[None, :] + source[:, None] * x_strides[1], mask=mask, other=0.0)
        if WRITE:
            moved = blocks + fresh + target[:, None] * (heads * HEAD_DIM) + dims[None, :]
            tl.store(moved, tokens, mask=mask)
        if TOTAL:
            values = tokens.to(tl.float32)
            if WEIGHTED:
                here = tl.load(weight_head[None, :] + source[:, None] * weight_strides[1], mask=mask, other=0.0)
                grad = weight_grad + fresh + source[:, None] * (heads * HEAD_DIM) + dims[None, :]
                tl.store(grad, (values * spread[None, :]).to(weight_grad.dtype.element_ty), mask=mask)
                values = values * here.to(tl.float32)
            total += tl.sum(values, 0)
    if TOTAL:
        if not WEIGHTED:
            total = total / length
        at_total = ((batch.to(tl.int64) * heads + head) * num_rows + row) * HEAD_DIM
        tl.store(totals + at_total + dims, total, mask=in_row)


@triton.jit(do_not_specialize=["heads", "num_blocks", "seq", "first_row", "num_rows"])
def _scatter_kernel(
    blocks, blocks1, blocks2, x, x1, x2, rows, rows1, rows2, weight, index, offsets,
    blocks_strides, rows_strides, weight_strides, heads, num_blocks, seq, first_row, num_rows,
    READ: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, PERMUTED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % num_blocks
    batch = tl.program_id(0) // heads // num_blocks
    if tl.program_id(1) == 1:
        x = x1
        blocks = blocks1
        rows = rows1
    elif tl.program_id(1) == 2:
        x = x2
        blocks = blocks2
        rows = rows2
    start = tl.load(offsets + block)
    length = tl.load(offsets + block + 1) - start
    row = block - first_row
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    in_row = dims < tl.where((row >= 0) & (row < num_rows), HEAD_DIM, 0)  # text blocks have none

    blocks_head = _at(blocks, blocks_strides, batch, head, dims)
    weight_head = _at(weight, weight_strides, batch, head, dims)
    x_head = x + (batch.to(tl.int64) * seq * heads + head) * HEAD_DIM + dims  # contiguous [B, S, H, D]
    spread = tl.zeros([BLOCK_D], tl.float32)
    if ROWS:
        at_row = _at(rows, rows_strides, batch, head, dims) + row.to(tl.int64) * rows_strides[1]
        spread = tl.load(at_row, mask=in_row, other=0.0).to(tl.float32)
        if not WEIGHTED:
            spread = spread / length
    for done in range(0, length, BLOCK_L):
        slots = done + tl.arange(0, BLOCK_L)
        inside = slots < length
        mask = inside[:, None] & in_head[None, :]
        source = (start + slots).to(tl.int64)
        target = tl.load(index + source, mask=inside, other=0) if PERMUTED else source
        place = x_head[None, :] + target[:, None] * (heads * HEAD_DIM)
        if ROWS:
            values = tl.zeros([BLOCK_L, BLOCK_D], tl.float32) + spread[None, :]
            if WEIGHTED:
                here = tl.load(weight_head[None, :] + target[:, None] * weight_strides[1], mask=mask, other=0.0)
                values = values * here.to(tl.float32)
            if READ:
                tokens = tl.load(blocks_head[None, :] + source[:, None] * blocks_strides[1], mask=mask, other=0.0)
                values += tokens.to(tl.float32)
            tl.store(place, values.to(x.dtype.element_ty), mask=mask)
        else:
            tokens = tl.load(blocks_head[None, :] + source[:, None] * blocks_strides[1], mask=mask, other=0.0)
            tl.store(place, tokens, mask=mask)


@cache
def _options(head_dim: int, max_len: int, **flags: bool) -> dict[str, Any]:
    """The compile-time arguments. One warp for pieces of 8 KiB in bf16: sums over tokens then need no barrier, which
    made pooling 1.6 times faster on an H200 than four warps for pieces of 16 KiB, and nothing slower."""
    block_d = triton.next_power_of_2(head_dim)
    block_l = min(triton.next_power_of_2(max_len), max(4096 // block_d, 1))
    # Triton 3.9 warns where fusion is not said, and 3.10 takes False.
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_L": block_l}
    return {**sizes, "num_warps": 1, "enable_fp_fusion": True, **flags}


def _grid(batch: int, num_blocks: int, heads: int, tensors: int) -> tuple[int, int]:
    """Programs of a launch: all in the first dimension, because the others end at 65,535."""
    return batch * num_blocks * heads, tensors


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(xs: Sequence[Tensor]) -> bool:
    first = xs[0]
    shape, strides, dtype = first.shape, first.stride(), first.dtype
    return all(x.shape == shape and x.stride() == strides and x.dtype == dtype for x in xs[1:])


def _three(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return xs[0], xs[len(xs) // 2], xs[-1]


def gather(
    xs: Sequence[Tensor], index: Tensor | None, offsets: Tensor, max_len: int, *, write: bool, mean: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens into blocks, and the means of the blocks.

    Shapes: at most three tensors [B, S, H, D] of any strides; index int64 [S], where the token at each place comes
    from (None: they are in block order); offsets int32 [N + 1], no block longer than max_len.

    Returns: of each, the tokens in block order (if `write`), and the fp32 means [B, H, N, D] (if `mean`).
    """
    xs = [_unit(x) for x in xs]
    if not _alike(xs):
        parts = [gather([x], index, offsets, max_len, write=write, mean=mean) for x in xs]
        return [x for blocks, _ in parts for x in blocks], [x for _, means in parts for x in means]
    first = xs[0]
    batch, seq, heads, dim = first.shape
    num_blocks = offsets.shape[0] - 1
    device = first.device
    blocks = [torch.empty(first.shape, dtype=first.dtype, device=device) for _ in xs] if write else []
    means = (
        [torch.empty((batch, heads, num_blocks, dim), dtype=torch.float32, device=device) for _ in xs] if mean else []
    )
    if first.numel():
        with torch.cuda.device_of(first):
            _gather_kernel[_grid(batch, num_blocks, heads, len(xs))](
                *_three(xs), *_three(blocks or xs), *_three(means or xs), first, first, first,
                offsets if index is None else index, offsets,
                first.stride(), _NO_STRIDES, _NO_STRIDES, heads, num_blocks, seq, 0, num_blocks,
                **_options(dim, max_len, WRITE=write, TOTAL=mean, WEIGHTED=False, PERMUTED=index is not None),
            )  # fmt: skip
    return blocks, means


def weighted_sums(
    x: Tensor, index: Tensor, offsets: Tensor, max_len: int, weight: Tensor, rows: Tensor, first_row: int
) -> tuple[Tensor, Tensor]:
    """What the gradient of weight * row is made of: the fp32 sums [B, H, n, D] of x * weight over the tokens of each
    block, and x * rows [B, S, H, D].

    Shapes: x and weight [B, S, H, D] in raster order; index and offsets as for `gather`; rows fp32 [B, n, H, D], those
    of the blocks from `first_row` on.
    """
    x, weight, rows = _unit(x), _unit(weight), _unit(rows)
    batch, seq, heads, dim = x.shape
    num_rows, num_blocks = rows.shape[1], offsets.shape[0] - 1
    sums = torch.empty(batch, heads, num_rows, dim, dtype=torch.float32, device=x.device)
    weight_grad = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _gather_kernel[_grid(batch, num_blocks, heads, 1)](
                x, x, x, x, x, x, sums, sums, sums, weight, rows, weight_grad, index, offsets,
                x.stride(), weight.stride(), rows.stride(), heads, num_blocks, seq, first_row, num_rows,
                **_options(dim, max_len, WRITE=False, TOTAL=True, WEIGHTED=True, PERMUTED=True),
            )  # fmt: skip
    return sums, weight_grad


def scatter(
    blocks: Sequence[Tensor] | None,
    index: Tensor | None,
    offsets: Tensor,
    max_len: int,
    *,
    seq: int,
    dtype: torch.dtype,
    rows: Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
    first_row: int = 0,
) -> list[Tensor]:
    """Tokens out of blocks, plus a row for each block: contiguous tensors [B, S, H, D] in `dtype`, at most three.

    Shapes: blocks [B, S, H, D] in block order, any strides (None: 0), S = seq; index, offsets and max_len as for
    `gather`; rows fp32 [B, n, H, D], those of the blocks from `first_row` on, of which blocks or rows must be given.
    With weight [B, S, H, D], in the order of the result, rows * weight is added; without it rows / length of the block
    (the gradient of a mean).
    """
    blocks, rows = ([_unit(x) for x in xs] if xs else None for xs in (blocks, rows))
    given = blocks or rows
    assert given
    if not all(_alike(xs) for xs in (blocks, rows) if xs):
        return [
            scatter(
                [blocks[at]] if blocks else None, index, offsets, max_len,
                seq=seq, dtype=dtype, rows=[rows[at]] if rows else None, weight=weight, first_row=first_row,
            )[0]
            for at in range(len(given))
        ]  # fmt: skip
    first = given[0]
    batch, _, heads, dim = first.shape
    num_blocks = offsets.shape[0] - 1
    found = [torch.empty((batch, seq, heads, dim), dtype=dtype, device=first.device) for _ in given]
    weight = None if weight is None else _unit(weight)
    if found[0].numel():
        with torch.cuda.device_of(first):
            _scatter_kernel[_grid(batch, num_blocks, heads, len(found))](
                *_three(blocks or found), *_three(found), *_three(rows or found), first if weight is None else weight,
                offsets if index is None else index, offsets,
                blocks[0].stride() if blocks else _NO_STRIDES, rows[0].stride() if rows else _NO_STRIDES,
                _NO_STRIDES if weight is None else weight.stride(),
                heads, num_blocks, seq, first_row, rows[0].shape[1] if rows else 0,
                **_options(
                    dim, max_len, READ=bool(blocks), ROWS=bool(rows), WEIGHTED=weight is not None,
                    PERMUTED=index is not None,
                ),
            )  # fmt: skip
    return found
