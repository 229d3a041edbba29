"""The Triton kernel that scores blocks against blocks at fp32 accuracy on tensor cores.

Which blocks are kept must not depend on rounding to tf32, and cuBLAS may round so where a program allows it for its
own products. An fp32 number is the exact sum of three bf16 numbers of 8 bits each; of the nine products of two such
sums, six reach 2**-24 of the result (the scheme of Henry, Tang and Heinecke 2019, arXiv 1904.06376).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

__all__ = ["block_scores"]

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# Triton 3.9 warns where fusion is not said, and 3.10 takes False.
_LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit
def _split(x):
    """fp32 as three bf16 that sum to it."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b^T for bf16 a and b."""
    if INTERPRETED:  # which would multiply the bit patterns of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc)


@triton.jit(do_not_specialize=["heads", "num_q", "num_kv"])
def _scores_kernel(
    q, k, scores, q_strides, k_strides, pitch, heads, num_q, num_kv, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(num_kv, BLOCK)
    tiles = tl.cdiv(num_q, BLOCK) * columns
    entry = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = entry // heads
    head = entry % heads
    q_rows = (tile // columns) * BLOCK + tl.arange(0, BLOCK)
    k_rows = (tile % columns) * BLOCK + tl.arange(0, BLOCK)
    q_head = q + batch.to(tl.int64) * q_strides[0] + head.to(tl.int64) * q_strides[2]
    k_head = k + batch.to(tl.int64) * k_strides[0] + (head // GROUP).to(tl.int64) * k_strides[2]
    # Rows past the end repeat the last one; what they score is not stored.
    q_at = q_head + tl.minimum(q_rows, num_q - 1).to(tl.int64)[:, None] * q_strides[1]
    k_at = k_head + tl.minimum(k_rows, num_kv - 1).to(tl.int64)[:, None] * k_strides[1]
    # The small products are summed apart, so that they are not lost one by one against the large sum.
    large = tl.zeros([BLOCK, BLOCK], tl.float32)
    small = tl.zeros([BLOCK, BLOCK], tl.float32)
    for done in range(0, HEAD_DIM, BLOCK_D):
        dims = done + tl.arange(0, BLOCK_D)[None, :]
        q0, q1, q2 = _split(tl.load(q_at + dims, mask=dims < HEAD_DIM, other=0.0))
        k0, k1, k2 = _split(tl.load(k_at + dims, mask=dims < HEAD_DIM, other=0.0))
        small = _dot(q1, k1, small)
        small = _dot(q2, k0, small)
        small = _dot(q0, k2, small)
        small = _dot(q1, k0, small)
        small = _dot(q0, k1, small)
        large = _dot(q0, k0, large)
    at = (entry.to(tl.int64) * num_q + q_rows[:, None]) * pitch + k_rows[None, :]
    mask = (q_rows < num_q)[:, None] & (k_rows < num_kv)[None, :]
    tl.store(scores + at, (large + small) * scale, mask=mask)


def block_scores(q_pooled: Tensor, k_pooled: Tensor, scale: float, scores: Tensor) -> None:
    """Write the scores fp32 [B, H, NQ, NK], any rows at one distance, of fp32 q_pooled [B, NQ, H, D] and k_pooled
    [B, NK, Hkv, D], any strides.

    A mean that is not finite makes its scores NaN, which rank below every number.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_pooled, k_pooled))
    batch, num_q, heads, dim = q.shape
    num_kv = k.shape[1]
    if scores.numel():
        options: dict[str, Any] = {"GROUP": heads // k.shape[2], "HEAD_DIM": dim, "BLOCK": 64, "BLOCK_D": 32}
        options |= _LAUNCH
        grid = (-(-num_q // 64) * -(-num_kv // 64) * batch * heads,)  # the other dimensions end at 65,535
        with torch.cuda.device_of(q):
            _scores_kernel[grid](
                q, k, scores, q.stride(), k.stride(), scores.stride(2), heads, num_q, num_kv, scale, **options,
            )  # fmt: skip
