"""PyTorch's FlexAttention as a backend, for plans whose blocks have one length."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from openvsa.plan import BlockPlan

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D] and lse fp32 [B, H, Sq] through `flex_attention`, compiled on first use."""
    block_mask = plan.to_flex_block_mask()
    out, aux = _compiled()(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    return out.transpose(1, 2), aux.float()


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
