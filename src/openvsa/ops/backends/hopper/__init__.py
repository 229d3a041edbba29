"""Kernels for Hopper GPUs (sm_90a) in CUDA C++: tensor copies, wgmma, a producer warp and consumer warpgroups.

The sources lie beside this file and are compiled by NVRTC when first used (see `compiler`). Where two warpgroups
share a block, tiles are loaded once for both. Both passes are deterministic: each gradient is summed in registers, by
one warpgroup, in the order of its list.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openvsa.ops.backends.hopper.compiler import TILE, Variant, launch, tensor_map
from openvsa.ops.plan_tensors import PlanTensors

__all__ = ["backward_kv", "backward_q", "forward", "row_terms"]


_POINTERS = {
    "query": ("q_offsets", "kv_offsets", "kv_num_blocks", "kv_indices"),
    "key": ("q_offsets", "kv_offsets", "q_starts", "q_indices"),
}
_STEPS_AND_HEADS = ("list_width", "batch_step", "head_step", "batch", "heads", "kv_heads")


class _QueryProblem(ctypes.Structure):
    """`Problem` of queries.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS["query"]),
        *((name, ctypes.c_int) for name in ("num_q_blocks", *_STEPS_AND_HEADS, "seq_q")),
    )


class _KeyProblem(ctypes.Structure):
    """`Problem` of dkv.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS["key"]),
        *((name, ctypes.c_int) for name in ("num_q_blocks", "num_kv_blocks", *_STEPS_AND_HEADS, "seq_kv")),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query block over the key blocks of its list.

    Shapes: q [B, Sq, H, D], k and v [B, Skv, Hkv, D], D 64 or 128, bfloat16 or float16. A tensor is copied only if its
    last dimension is not contiguous or its rows do not begin at multiples of 16 bytes. The scale is positive.
    Returns out [B, Sq, H, D] in the dtype of q, and lse [B, H, Sq] fp32; 0 and -inf for a row that reads nothing.
    """
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    plan = _contiguous(plan)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    variant = Variant.of("forward", q, plan)
    items = _tiles(plan.q_offsets, variant.q_pieces, variant) * q.shape[2] * q.shape[0]
    problem = _query_problem(q, k, plan)
    with torch.cuda.device_of(q):
        if variant.kernel == "forward_wide":
            maps = (tensor_map(k, 1), tensor_map(v, 1))
            launch(variant, items, *maps, problem, q, out, lse, _counter(q), *_steps(q), scale)
        else:
            maps = (tensor_map(q), tensor_map(k), tensor_map(v))
            launch(variant, items, *maps, problem, out, lse, _counter(q), scale)
    return out, lse


def row_terms(q: Tensor, plan: PlanTensors) -> Tensor:
    """Room for what `backward_q` leaves for `backward_kv` of each query row: lse and delta, in tiles of 64 rows."""
    pieces = Variant.of("dq", q, plan).q_pieces
    tiles = plan.kv_indices.shape[2] * pieces
    return q.new_empty(q.shape[0], q.shape[2], tiles, 2, TILE, dtype=torch.float32)


def backward_q(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: PlanTensors, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of q, in its dtype and shape, and the `row_terms`.

    do [B, Sq, H, D] in the dtype of q; dlse, lse [B, H, Sq] fp32. Deterministic, and so is `backward_kv`.
    """
    q, k, v, do, out = (_loadable(x) for x in (q, k, v, do, out))
    lse, dlse, plan = lse.contiguous(), dlse.contiguous(), _contiguous(plan)
    dq, terms = torch.empty(q.shape, dtype=q.dtype, device=q.device), row_terms(q, plan)
    variant = Variant.of("dq", q, plan)
    items = _tiles(plan.q_offsets, variant.q_pieces, variant) * q.shape[2] * q.shape[0]
    steps = (*_steps(q), *_steps(out), *_steps(do))
    with torch.cuda.device_of(q):
        maps = (tensor_map(k), tensor_map(v), tensor_map(do))
        rest = (q, out, do, dq, lse, dlse, terms, _counter(q))
        launch(variant, items, *maps, _query_problem(q, k, plan), *rest, *steps, scale)
    return dq, terms


def backward_kv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, _lse: Tensor, terms: Tensor, plan: PlanTensors, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, in their dtypes and shapes. The plan must carry its transpose. lse is in `terms`."""
    q, k, v, do = (_loadable(x) for x in (q, k, v, do))
    plan = _contiguous(plan)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    num_q_blocks, width = plan.kv_indices.shape[2:]
    variant = Variant.of("dkv", q, plan)
    items = _tiles(plan.kv_offsets, variant.kv_pieces, variant) * k.shape[2] * k.shape[0]
    problem = _KeyProblem(
        *(getattr(plan, name).data_ptr() for name in _POINTERS["key"]),
        num_q_blocks, plan.kv_offsets.numel() - 1, num_q_blocks * width, *_plan_steps(plan),
        q.shape[0], q.shape[2], k.shape[2], k.shape[1],
    )  # fmt: skip
    with torch.cuda.device_of(q):
        maps = (tensor_map(q), tensor_map(do), tensor_map(k), tensor_map(v))
        launch(variant, items, *maps, problem, terms, dk, dv, _counter(q), scale)
    return dk, dv


def _loadable(x: Tensor) -> Tensor:
    """x itself, or a copy if a tensor copy cannot read it."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:  # most are: its rows are of 128 or 256 bytes
        return x
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 and 0 < stride < 2**38 for stride in strides)
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head."""
    return x.stride(0), x.stride(1), x.stride(2)


def _counter(x: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=x.device)


def _tiles(offsets: Tensor, pieces: int, variant: Variant) -> int:
    """Work items of one head."""
    return -(-(offsets.numel() - 1) * pieces // variant.consumers)


def _contiguous(plan: PlanTensors) -> PlanTensors:
    return plan._replace(kv_num_blocks=plan.kv_num_blocks.contiguous(), kv_indices=plan.kv_indices.contiguous())


def _plan_steps(plan: PlanTensors) -> tuple[int, int]:
    batches, heads = plan.kv_num_blocks.shape[:2]
    return heads if batches > 1 else 0, 1 if heads > 1 else 0


def _query_problem(q: Tensor, k: Tensor, plan: PlanTensors) -> _QueryProblem:
    num_q_blocks, width = plan.kv_indices.shape[2:]
    return _QueryProblem(
        *(getattr(plan, name).data_ptr() for name in _POINTERS["query"]),
        num_q_blocks, width, *_plan_steps(plan), q.shape[0], q.shape[2], k.shape[2], q.shape[1],
    )  # fmt: skip
