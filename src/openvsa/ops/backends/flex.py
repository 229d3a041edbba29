"""PyTorch's FlexAttention as a backend, for plans whose blocks have one length."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from openvsa.plan import BlockPlan

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, D] and lse fp32 [B, H, Sq] through `flex_attention`, compiled on first use."""
    # Inside a compiled caller it becomes part of that graph.
    attend = flex_attention if torch.compiler.is_compiling() else _attend
    # In one layout, gradient included: Inductor's kernels, and so the last bits, would depend on the strides.
    out, lse = attend(
        q.transpose(1, 2).contiguous(),
        k.transpose(1, 2).contiguous(),
        v.transpose(1, 2).contiguous(),
        block_mask=plan.to_flex_block_mask(),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    return _ContiguousGradient.apply(out).transpose(1, 2), lse.float()


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _attend(*args: Any, **kwargs: Any) -> Any:
    # Each dtype, head size and block size is compiled for itself. Past Dynamo's limit of 8 it would run dense, eagerly.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compiled()(*args, **kwargs)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, fullgraph=True)
