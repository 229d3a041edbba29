"""The public op."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from openvsa.errors import PlanError, ShapeError
from openvsa.ops.capability import Problem
from openvsa.ops.registry import choose
from openvsa.plan import BlockPlan

__all__ = ["block_sparse_attention"]


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = ..., backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = ..., backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of each query over the tokens of the key blocks that `plan` gives to its block.

    Args:
        q: [B, Sq, H, D], any strides, tokens in block order (see TileLayout.permute).
        k, v: [B, Skv, Hkv, D] and [B, Skv, Hkv, Dv], with H a multiple of Hkv; head h reads key head h * Hkv // H.
        plan: over Sq query and Skv key tokens, for batch B or 1 and heads H or 1, on the device of q.
        scale: multiplies q·k; None means 1 / sqrt(D).
        backend: "auto" takes the first backend that can run the problem, in the order of `openvsa doctor`; a name
            takes that one or raises. Nothing falls back silently.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, Sq, H, Dv] in the dtype of q and, if asked for, lse [B, H, Sq]: the natural log of the sum of
        exponentials, fp32 (fp64 for fp64 input). A query that reads nothing has out 0
        and lse -inf. Both are differentiable with respect to q, k and v.

    Raises:
        ShapeError: tensors do not fit each other.
        PlanError: the plan is over other token counts, batch, heads or device.
        UnsupportedError: no backend (or not the one named) can run it; the message has every reason.
    """
    check_qkv(q, k, v)
    _check_plan(q, k, plan)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    run = choose(Problem.of(q, k, v, plan), backend).run
    # Backends choose their precision themselves: autocast would round their fp32 intermediates.
    with torch.autocast(q.device.type, enabled=False):
        out, lse = run(q, k, v, plan, scale)
    return (out, lse) if return_lse else out


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError unless q [B, Sq, H, D], k [B, Skv, Hkv, D] and v [B, Skv, Hkv, Dv] fit each other."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ShapeError(f"q, k and v must be [batch, seq, heads, head_dim], got {shapes}")
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v must agree in batch, seq and heads, got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k must agree in batch and head_dim, got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ShapeError(f"the {q.shape[2]} heads of q must be a multiple of the {k.shape[2]} heads of k; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ShapeError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _check_plan(q: Tensor, k: Tensor, plan: BlockPlan) -> None:
    batch, heads = plan.kv_num_blocks.shape[:2]
    if plan.q_blocks.num_tokens != q.shape[1] or plan.kv_blocks.num_tokens != k.shape[1]:
        raise PlanError(
            f"the plan is over {plan.q_blocks.num_tokens} query and {plan.kv_blocks.num_tokens} key tokens, but q has "
            f"{q.shape[1]} and k has {k.shape[1]}"
        )
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise PlanError(
            f"the plan is for batch {batch} and {heads} heads, but q has batch {q.shape[0]} and {q.shape[2]} heads; "
            "a plan needs the same numbers, or 1 to broadcast"
        )
    if plan.device != q.device:
        raise PlanError(f"the plan is on {plan.device}, but q is on {q.device}; move it with plan.to(q.device)")
