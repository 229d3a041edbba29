"""FlashAttention-4 as a backend, for plans whose blocks have one length.

Facts are those of flash-attn-4 4.0.0b36 (https://github.com/Dao-AILab/flash-attention, flash_attn/cute/interface.py):

- Forward walks lists of key blocks per query block, backward lists of query blocks per key block. The two are separate
  arguments, and a backward without its lists is dense, against the lse of the sparse forward. So both passes are called
  by themselves here, each with its lists.
- Only the highest key block of a list is masked at the end of the sequence: lists must ascend, as ours do.
- Heads are not packed into query tiles: packed tiles may hold rows of two query blocks.
- The gradient of the lse is taken; dQ, and with grouped heads dK and dV, are summed in no fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvsa.errors import require
from openvsa.ops.plan_tensors import PlanTensors
from openvsa.plan.convert import csr_to_lists

__all__ = ["backward", "forward"]


def forward(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D] and lse fp32 [B, H, Sq], for q [B, Sq, H, D] and k, v [B, Skv, Hkv, D]."""
    fa4 = require("flash_attn.cute", extra="fa4")
    with torch.no_grad(), torch.cuda.device_of(q):
        return fa4.flash_attn_func(
            q, k, v,
            softmax_scale=scale,
            pack_gqa=False,
            block_sparse_tensors=_block_lists(plan.kv_num_blocks, plan.kv_indices, plan),
            return_lse=True,
        )  # fmt: skip


def backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from those of out [B, Sq, H, D] and lse [B, H, Sq]."""
    # What FA4's own autograd function calls, and PyTorch's FlexAttention too; there is no public name for it.
    interface = require("flash_attn.cute.interface", extra="fa4")
    q_starts, q_indices = plan.q_starts, plan.q_indices
    assert q_starts is not None
    assert q_indices is not None
    readers = csr_to_lists(q_starts, q_indices, plan.q_offsets.numel() - 1, None)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    with torch.no_grad(), torch.cuda.device_of(q):
        interface._flash_attn_bwd(
            q, k, v, out, do, lse,
            softmax_scale=scale,
            dlse=dlse,
            dq=dq,
            dk=dk,
            dv=dv,
            block_sparse_tensors=_block_lists(*readers, plan),
        )  # fmt: skip
    return dq, dk, dv


def _block_lists(counts: Tensor, indices: Tensor, plan: PlanTensors) -> Any:
    """FA4's form of lists: counts [B|1, H|1, N], indices [B|1, H|1, N, K]. All blocks are full (none is masked inside),
    so that the list of partial ones is empty."""
    block_sparsity = require("flash_attn.cute.block_sparsity", extra="fa4")
    partial = counts.new_zeros(1, 1, counts.shape[2])
    return block_sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=partial,
        mask_block_idx=partial[..., None],
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(plan.max_q_block, plan.max_kv_block),
    )
