"""Device memory of training the whole op, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openvsa import Budget, TileLayout, video_sparse_attention
from openvsa.bench.timing import peak_bytes
from openvsa.ops.registry import backends

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUT = TileLayout((8, 32, 32), (4, 4, 4))
NAMES = [b.name for b in backends() if b.name in ("hopper", "triton") and not b.available("cuda")]


def peak(attend: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Most bytes during forward and backward, with those of the inputs and of the gradient of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(attend(*leaves), leaves, grad)

    step()
    found = peak_bytes(step, DEVICE, sum(x.nbytes for x in (*inputs, grad)))
    assert found is not None
    return found


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
@pytest.mark.parametrize("backend", NAMES)
def test_at_most_1_15_of_dense_flash_attention(backend: str, branch: bool) -> None:
    def sparse(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
        return video_sparse_attention(q, k, v, LAYOUT, Budget(keep_ratio=0.125), weight, backend=backend)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    shape = (1, LAYOUT.num_tokens, 12, 128)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(4 if branch else 3)]
    heads_first = [x.transpose(1, 2).contiguous() for x in inputs[:3]]
    assert peak(sparse, inputs) <= 1.15 * peak(dense, heads_first)
