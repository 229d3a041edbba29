"""Pooling, scoring and combining by kernels against the plain code and fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import DEVICE
from openvsa import TileLayout
from openvsa.layout import BlockOffsets
from openvsa.select import pool_mean, pooled_scores
from openvsa.select.pool import permute_pool, unpermute_add
from plain import both
from tolerance import FORWARD, GRADIENT, excess

pytestmark = pytest.mark.triton

LAYOUTS = [
    TileLayout((5, 3, 5), (2, 2, 3)),
    TileLayout((5, 6), (4, 4), prefix=5, suffix=2),
    TileLayout((5, 6), (2, 3), prefix=8, suffix=7, q_tiles=(1, 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuting_and_pooling(layout: TileLayout, dtype: torch.dtype) -> None:
    def run() -> tuple[Tensor, ...]:
        x = torch.randn(2, layout.num_tokens, 2, 20).to(DEVICE, dtype).requires_grad_()
        outs = (*permute_pool(x, layout, layout.q_blocks), pool_mean(x, layout.blocks))
        return *outs, *torch.autograd.grad(outs, x, [torch.randn(y.shape).to(y) for y in outs])

    ours, theirs = both(run)
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-6 if a.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
def test_adding_the_compressed_branch(layout: TileLayout, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Against fp64, by the tolerance of the project; the plain code in the same dtypes is the naive one."""
    tiles = layout.q_tile_blocks

    def run(exactly: bool = False) -> list[Tensor]:
        x = torch.randn(2, layout.num_tokens, 2, 20).to(DEVICE, dtypes[0]).requires_grad_()
        weight = torch.randn(2, layout.num_tokens, 2, 20).to(DEVICE, dtypes[1]).requires_grad_()
        rows = torch.randn(2, tiles.stop - tiles.start, 2, 20, device=DEVICE).requires_grad_()
        grad_out = torch.randn(x.shape).to(DEVICE, dtypes[0])
        inputs = [y.double() for y in (x, weight, rows)] if exactly else [x, weight, rows]
        out = unpermute_add(inputs[0], layout, inputs[1], inputs[2])
        assert exactly or out.dtype == dtypes[0]
        return [out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]

    ours, theirs = both(run)
    torch.manual_seed(1)
    exact = run(exactly=True)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype
        assert excess(a, b, c.detach(), GRADIENT if i else FORWARD) == []


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 128), (4, 2, 40), (1, 1, 3)])
def test_scores_have_the_accuracy_of_fp32(size: float, heads: int, kv_heads: int, dim: int) -> None:
    q = (size * torch.randn(2, 70, heads, dim)).to(DEVICE)
    k = torch.randn(2, 5, kv_heads, dim, device=DEVICE)
    exact = torch.einsum("bqhd,bnhd->bhqn", q.double(), k.double().repeat_interleave(heads // kv_heads, 2)) * 0.3
    ours, theirs = both(lambda: pooled_scores(q, k, 0.3))
    assert ours.dtype == torch.float32
    assert excess(ours, theirs, exact, FORWARD) == []


def test_scores_of_views() -> None:
    q, k = (
        torch.randn(2, 3, 9, 16, device=DEVICE).transpose(1, 2),
        torch.randn(2, 12, 3, 32, device=DEVICE)[:, 2:7, :, ::2],
    )
    ours, theirs = both(lambda: pooled_scores(q[:, 1:8], k, 1.0))
    torch.testing.assert_close(ours, theirs)


def test_nan_stays_in_its_row() -> None:
    q, k = torch.randn(1, 6, 1, 8, device=DEVICE), torch.randn(1, 6, 1, 8, device=DEVICE)
    q[0, 2, 0, 3] = float("nan")
    wrong = pooled_scores(q, k, 1.0).isnan()
    assert wrong[0, 0, 2].all()
    assert wrong.sum() == 6


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_of_scores(kv_heads: int) -> None:
    q, k = torch.randn(2, 5, 4, 8, device=DEVICE), torch.randn(2, 3, kv_heads, 8, device=DEVICE)
    grad_out = torch.randn(2, 4, 5, 3, device=DEVICE)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        grads.append(torch.autograd.grad(pooled_scores(*leaves, 0.3), leaves, grad_out.to(dtype)))
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_pooling_one_long_block() -> None:
    x = torch.ones(1, 257, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    assert pool_mean(x, BlockOffsets([257])).item() == 1.0


def test_opcheck() -> None:
    q, k = torch.randn(1, 4, 2, 8, device=DEVICE), torch.randn(1, 3, 1, 8, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.openvsa.block_scores.default, (q.requires_grad_(), k.requires_grad_(), 0.5), test_utils=checks
    )
