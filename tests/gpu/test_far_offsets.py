"""Tensors of more than 2**31 elements: their last heads get the bits that they get alone. Needs a GPU with 80 GB."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openvsa import Budget, TileLayout, video_sparse_attention
from openvsa.ops.registry import backends

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
KERNELS = [b.name for b in backends() if b.name in ("hopper", "triton") and not b.available("cuda")]
LAYOUT = TileLayout((32, 64, 64), (4, 4, 4))
HEADS, LAST = 129, 2


def whole_op(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, kernel: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = video_sparse_attention(*leaves, LAYOUT, Budget(top_k=8), backend=kernel)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_heads_are_those_alone(kernel: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, LAYOUT.num_tokens, HEADS, 128)
    q, k, v, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator) for _ in range(4)
    )
    assert q.numel() > 2**31
    found = whole_op(q, k, v, grad, kernel)
    for name, all_heads, alone in zip(
        ("out", "dq", "dk", "dv"), found, whole_op(*(x[:, :, -LAST:].clone() for x in (q, k, v, grad)), kernel),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(all_heads[:, :, -LAST:], alone), name
