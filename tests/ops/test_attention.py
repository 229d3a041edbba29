"""The public op: what must hold for any backend, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers import DEVICE, offsets, random_mask
from openvsa import BlockPlan, PlanError, ShapeError, UnsupportedError, block_sparse_attention

LENS = (16, 7, 16, 3)
S = sum(LENS)


def qkv(batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, S, h, dim, device=DEVICE) for h in (heads, kv_heads, kv_heads))
    return q, k, v


def plan_of(shape: tuple[int, int] = (2, 4)) -> BlockPlan:
    mask = random_mask((*shape, 4, 4), 0.4, torch.Generator().manual_seed(0))
    return BlockPlan.from_block_mask(mask, offsets(LENS), offsets(LENS)).to(DEVICE)


def test_reading_everything_is_dense_attention() -> None:
    q, k, v = qkv()
    out = block_sparse_attention(q, k, v, BlockPlan.dense(offsets(LENS), offsets(LENS), DEVICE))
    dense = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    torch.testing.assert_close(out.double(), dense.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_scale_is_one_over_the_root_of_head_dim() -> None:
    q, k, v = qkv()
    plan = plan_of()
    default = block_sparse_attention(q, k, v, plan)
    assert torch.equal(default, block_sparse_attention(q, k, v, plan, scale=1 / math.sqrt(16)))
    assert not torch.allclose(default, block_sparse_attention(q, k, v, plan, scale=1.0))


def test_permuting_the_batch_permutes_the_result() -> None:
    q, k, v = qkv()
    plan = plan_of()
    swapped = BlockPlan(plan.kv_num_blocks.flip(0), plan.kv_indices.flip(0), plan.q_blocks, plan.kv_blocks)
    out = block_sparse_attention(q, k, v, plan)
    assert torch.equal(block_sparse_attention(*(x.flip(0) for x in (q, k, v)), swapped), out.flip(0))


def test_permuting_the_heads_permutes_the_result() -> None:
    q, k, v = qkv(kv_heads=4)
    plan, order = plan_of(), torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved = BlockPlan(plan.kv_num_blocks[:, order], plan.kv_indices[:, order], plan.q_blocks, plan.kv_blocks)
    out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
    out_moved, lse_moved = block_sparse_attention(*(x[:, :, order] for x in (q, k, v)), moved, return_lse=True)
    assert torch.equal(out_moved, out[:, :, order])
    assert torch.equal(lse_moved, lse[:, order])


def test_a_broadcast_plan_is_the_repeated_plan() -> None:
    q, k, v = qkv()
    one = plan_of((1, 1))
    for b, h in ((2, 1), (1, 4), (2, 4)):
        repeated = BlockPlan(
            one.kv_num_blocks.expand(b, h, 4), one.kv_indices.expand(b, h, 4, -1), one.q_blocks, one.kv_blocks
        )
        assert torch.equal(block_sparse_attention(q, k, v, repeated), block_sparse_attention(q, k, v, one))


def test_grouped_heads_are_repeated_heads() -> None:
    q, k, v = qkv()
    plan = plan_of()
    repeated = block_sparse_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), plan)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), repeated)


def test_keys_that_no_plan_reads_get_no_gradient() -> None:
    q, k, v = qkv(heads=2)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2] = False
    plan = BlockPlan.from_block_mask(mask.to(DEVICE), offsets(LENS), offsets(LENS))
    k, v = k.requires_grad_(), v.requires_grad_()
    out = block_sparse_attention(q, k, v, plan)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert (grad[:, 23:39] == 0).all()
        assert (grad[:, :23] != 0).any()


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, S, 4), (2, S, 4, 16), (2, S, 4, 16), r"must be \[batch, seq, heads, head_dim\], got q \(2, 42, 4\)"),
        ((2, S, 4, 16), (2, S, 2, 16), (2, S, 4, 16), r"k and v must agree.*k \(2, 42, 2, 16\), v \(2, 42, 4, 16\)"),
        ((2, S, 4, 16), (2, S, 2, 16), (2, S - 1, 2, 16), "k and v must agree in batch, seq and heads"),
        ((2, S, 4, 16), (1, S, 2, 16), (1, S, 2, 16), "q and k must agree in batch and head_dim"),
        ((2, S, 4, 16), (2, S, 2, 8), (2, S, 2, 8), "q and k must agree in batch and head_dim"),
        ((2, S, 4, 16), (2, S, 3, 16), (2, S, 3, 16), "the 4 heads of q must be a multiple of the 3 heads of k"),
        ((2, S, 4, 0), (2, S, 2, 0), (2, S, 2, 0), "q and k must have a head_dim of 1 or more, got"),
        ((2, S, 4, 16), (2, S, 0, 16), (2, S, 0, 16), "the 4 heads of q must be a multiple of the 0 heads of k"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple, k: tuple, v: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        block_sparse_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), plan_of())


def test_dtypes_and_devices_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match=r"one floating dtype, got torch\.float32, torch\.float64"):
        block_sparse_attention(q, k.double(), v, plan_of())
    with pytest.raises(ShapeError, match=r"one floating dtype, got torch\.int64"):
        block_sparse_attention(q.long(), k.long(), v.long(), plan_of())
    with pytest.raises(ShapeError, match=r"one device, got .* and meta"):
        block_sparse_attention(q, k, v.to("meta"), plan_of())


def test_what_is_no_tensor_or_no_scale_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match=r"must be plain tensors .*, got Tensor, list, Tensor"):
        block_sparse_attention(q, k.tolist(), v, plan_of())
    with pytest.raises(ShapeError, match=r"must be plain tensors .*, got nested Tensor, Tensor, Tensor"):
        block_sparse_attention(torch.nested.nested_tensor([q[0]]), k, v, plan_of())
    for scale in (float("nan"), float("inf"), "a", [1.0]):
        with pytest.raises(ShapeError, match="scale must be a finite number, or None for 1 / sqrt"):
            block_sparse_attention(q, k, v, plan_of(), scale=scale)  # pyright: ignore


def test_plans_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(PlanError, match="over 41 query and 42 key tokens, but q has 42 and k has 42"):
        block_sparse_attention(q, k, v, BlockPlan.dense([0, 41], offsets(LENS), DEVICE))
    with pytest.raises(PlanError, match="over 42 query and 41 key tokens"):
        block_sparse_attention(q, k, v, BlockPlan.dense(offsets(LENS), [0, 41], DEVICE))
    with pytest.raises(PlanError, match="for batch 3 and 4 heads, but q has batch 2 and 4 heads"):
        block_sparse_attention(q, k, v, plan_of((3, 4)))
    with pytest.raises(PlanError, match="for batch 2 and 2 heads, but q has batch 2 and 4 heads"):
        block_sparse_attention(q, k, v, plan_of((2, 2)))
    with pytest.raises(PlanError, match=r"the plan is on meta, but q is on .*plan\.to\(q\.device\)"):
        block_sparse_attention(q, k, v, plan_of().to("meta"))


@pytest.mark.parametrize("plan", [None, torch.ones(1, 1, 4, 4, dtype=torch.bool)])
def test_what_is_no_plan_is_refused(plan: object) -> None:
    with pytest.raises(PlanError, match=r"must be a BlockPlan, got (NoneType|Tensor);.*from_flex_block_mask"):
        block_sparse_attention(*qkv(), plan)  # pyright: ignore[reportArgumentType]


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in qkv())
    out, lse = block_sparse_attention(q, k, v, plan_of().to("meta"), return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, (2, 4, S))
    assert torch.autograd.grad(out.sum() + lse.sum(), k)[0].shape == k.shape


def test_a_backend_that_cannot_is_refused_with_reasons() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match="the backend 'flex' cannot run this problem") as caught:
        block_sparse_attention(q, k, v, plan_of(), backend="flex")
    assert any("one length" in why for why in caught.value.reasons["flex"])
    with pytest.raises(UnsupportedError, match="there is no backend 'fast'"):
        block_sparse_attention(q, k, v, plan_of(), backend="fast")
    with pytest.raises(UnsupportedError, match=r"there is no backend \['cpu'\]"):
        block_sparse_attention(q, k, v, plan_of(), backend=["cpu"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert issubclass(UnsupportedError, NotImplementedError)
