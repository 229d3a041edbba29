"""The public op."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from openvsa.errors import PlanError, ShapeError
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.registry import backends, choose
from openvsa.plan import BlockPlan
from openvsa.torch_op import check_not_traced

__all__ = ["attend", "block_sparse_attention", "check_qkv", "scale_of"]


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
        ShapeError: tensors do not fit each other, or scale is not a finite number.
        PlanError: the plan is over other token counts, batch, heads or device.
        UnsupportedError: no backend (or not the one named) can run it; the message has every reason.
    """
    check_not_traced("block-sparse attention")
    check_qkv(q, k, v)
    _check_plan(q, k, plan)
    return attend(q, k, v, plan, scale, backend, return_lse=return_lse)


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, backend: str,
    *, return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, backend: str, *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, backend: str, *, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float | None,
    backend: str,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` of tensors and a plan that are known to fit each other."""
    scale = scale_of(scale, q.shape[-1])
    if scale <= 0:
        # Kernels look for the largest score, and hide what is past the end of a block, before they scale.
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    run = _choose(q, k, v, plan, backend).run
    if not (torch.compiler.is_compiling() or q.numel()):
        # Plain torch: a GPU refuses to launch nothing.
        run = choose(Problem.of(q, k, v, plan), "reference").run
    device_type = q.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta tensors know no autocast
        # Backends choose their precision themselves: autocast would round their fp32 intermediates.
        with torch.autocast(device_type, enabled=False):
            out, lse = run(q, k, v, plan, scale)
    else:
        out, lse = run(q, k, v, plan, scale)
    return (out, lse) if return_lse else out


_MOST_CHOICES = 4096
_CHOICES: dict[tuple[object, ...], tuple[Backend, tuple[Backend, ...]]] = {}  # and what there was to choose from


def _choose(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, name: str) -> Backend:
    """The backend for a call; for one like an earlier one without looking at the backends again."""
    if torch.compiler.is_compiling() or not isinstance(name, str):
        return choose(Problem.of(q, k, v, plan), name)
    q_blocks, kv_blocks = plan.q_blocks, plan.kv_blocks
    key = (
        name, q.device, q.dtype, q.shape, k.shape, v.shape[3], q_blocks.max_len, kv_blocks.max_len,
        q_blocks.uniform_len is None or kv_blocks.uniform_len is None,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    found, among = _CHOICES.get(key, (None, None))
    if found is None or among is not backends():
        found = choose(Problem.of(q, k, v, plan), name)
        if len(_CHOICES) >= _MOST_CHOICES:
            _CHOICES.clear()
        _CHOICES[key] = found, backends()
    return found


def scale_of(scale: float | None, head_dim: int) -> float:
    """What q·k is multiplied by: `scale`, or 1 / sqrt(head_dim) if it is None."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not -math.inf < value < math.inf:
        raise ShapeError(f"scale must be a finite number, or None for 1 / sqrt(head_dim), got {scale!r}")
    return value


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError unless q [B, Sq, H, D], k [B, Skv, Hkv, D] and v [B, Skv, Hkv, Dv] fit each other."""
    if not all(isinstance(x, Tensor) and not x.is_nested for x in (q, k, v)):
        got = ", ".join(("nested " if getattr(x, "is_nested", False) else "") + type(x).__name__ for x in (q, k, v))
        raise ShapeError(f"q, k and v must be plain tensors [batch, seq, heads, head_dim], got {got}")
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if (
        len(q_shape) == len(k_shape) == len(v_shape) == 4
        and k_shape[:3] == v_shape[:3]
        and q_shape[0] == k_shape[0]
        and q_shape[3] == k_shape[3]
        and k_shape[2]
        and k_shape[3]
        and not q_shape[2] % k_shape[2]
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.device == k.device == v.device
    ):
        return
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ShapeError(f"q, k and v must be [batch, seq, heads, head_dim], got {shapes}")
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v must agree in batch, seq and heads, got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k must agree in batch and head_dim, got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ShapeError(f"the {q.shape[2]} heads of q must be a multiple of the {k.shape[2]} heads of k; got {shapes}")
    if k.shape[3] == 0:
        raise ShapeError(f"q and k must have a head_dim of 1 or more, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ShapeError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _check_plan(q: Tensor, k: Tensor, plan: BlockPlan) -> None:
    if not isinstance(plan, BlockPlan):
        raise PlanError(
            f"plan must be a BlockPlan, got {type(plan).__name__}; a FlexAttention BlockMask becomes one by "
            "BlockPlan.from_flex_block_mask"
        )
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
