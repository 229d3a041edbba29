"""The oracle itself: against dense SDPA, against loops over single queries, and its gradients numerically."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers import DEVICE, Case, make_inputs, random_lens, run_reference
from openvsa import BlockPlan
from openvsa.ops.reference import reference_attention

SMALL = Case("small", (2, 1, 2), (1, 3, 2), batch=2, kv_heads=1, head_dim=2, plan_heads=2, plan_batch=2, empty_row=True)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    return reference_attention(
        q, k, v, plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, scale
    )  # fmt: skip


def test_gradients_numerically() -> None:
    inputs = make_inputs(SMALL, torch.float64)
    finite = attend(*inputs[:4], inputs.scale)[1].isfinite()

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, inputs.plan, inputs.scale)
        return out, lse[finite]

    assert not finite.all()
    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in inputs[:3]))


def test_reading_everything_is_dense_attention() -> None:
    q, k, v = (torch.randn(2, 30, 3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(3))
    plan = BlockPlan.dense([0, 7, 30], [0, 10, 11, 30], DEVICE)
    out, _ = attend(q, k, v, plan, 1 / math.sqrt(8))
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, dense)
    do = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(dense, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_query_by_itself(kv_heads: int) -> None:
    """Softmax attention written out for one query at a time, over the tokens its block may read."""
    lens = random_lens(5, 1, 6, seed=0)
    case = Case("by-hand", lens, lens, batch=2, heads=4, kv_heads=kv_heads, head_dim=4, plan_heads=4, empty_row=True)
    q, k, v, plan, *_, scale, _ = make_inputs(case, torch.float64)
    out, lse = attend(q, k, v, plan, scale)
    mask, starts = plan.block_mask().tolist(), plan.q_offsets.tolist()
    for b in range(2):
        for h in range(4):
            for i in range(len(lens)):
                tokens = [t for j in range(len(lens)) if mask[0][h][i][j] for t in range(starts[j], starts[j + 1])]
                keys, values = k[b, tokens, h * kv_heads // 4], v[b, tokens, h * kv_heads // 4]
                for t in range(starts[i], starts[i + 1]):
                    weights = (keys @ q[b, t, h] * scale).exp()
                    # Without tokens both sums are 0.
                    expected = (weights[:, None] * values).sum(0) / weights.sum().clamp_min(1e-300)
                    torch.testing.assert_close(out[b, t, h], expected)
                    torch.testing.assert_close(lse[b, h, t], weights.sum().log())


def test_empty_rows_are_zero_and_get_no_gradient() -> None:
    inputs = make_inputs(SMALL, torch.float64)
    results = run_reference(inputs, torch.float64)
    row = slice(2, 3)  # query block 1 of batch 0 and head 0 reads nothing
    assert (results.out[0, row, 0] == 0).all()
    assert (results.lse[0, 0, row] == float("-inf")).all()
    assert (results.dq[0, row, 0] == 0).all()
    assert all(x.isfinite().all() for x in (results.out, results.dq, results.dk, results.dv))


def test_dtypes() -> None:
    inputs = make_inputs(SMALL, torch.bfloat16)
    out, lse = attend(*inputs[:4], inputs.scale)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out, lse = attend(*(x.double() for x in inputs[:3]), inputs.plan, inputs.scale)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
