"""The oracle: block-sparse attention in the plainest torch there is.

It materialises the whole score matrix and masks it. Every other backend is tested against it, so it shares no
code with any of them and imports nothing of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of each query over the tokens of the key blocks its block is planned to read.

    Shapes: q [B, Sq, H, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv] with H a multiple of Hkv; q_offsets [NQ + 1],
    kv_offsets [NK + 1], kv_num_blocks [B|1, H|1, NQ], kv_indices [B|1, H|1, NQ, K]. Any floating dtype; the
    arithmetic is done in that dtype and differentiated by autograd, so fp64 in means fp64 throughout.

    Returns out [B, Sq, H, Dv] in the dtype of q, and lse [B, H, Sq], the natural log of the sum of exponentials
    (fp32, or fp64 for fp64 input). A row that reads nothing has out 0 and lse -inf, and gets zero gradients.
    """
    groups = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)

    planned = torch.arange(kv_indices.shape[-1], device=q.device) < kv_num_blocks[..., None]
    num_kv_blocks = kv_offsets.numel() - 1
    block_mask = torch.zeros(*kv_num_blocks.shape, num_kv_blocks + 1, dtype=torch.bool, device=q.device)
    slots = torch.where(planned, kv_indices, num_kv_blocks).long()
    block_mask = block_mask.scatter(-1, slots, True)[..., :num_kv_blocks]

    q_block_of = torch.repeat_interleave(q_offsets.diff().long(), output_size=q.shape[1])
    kv_block_of = torch.repeat_interleave(kv_offsets.diff().long(), output_size=k.shape[1])
    mask = block_mask[:, :, q_block_of][..., kv_block_of]

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    p = scores.softmax(-1).masked_fill(empty, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v)
    return out, lse if lse.dtype == torch.float64 else lse.float()
