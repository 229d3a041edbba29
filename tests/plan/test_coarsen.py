"""Larger and smaller blocks: coarsening loses no pair, refining changes none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DEVICE, offsets
from openvsa import BlockPlan, PlanError, block_sparse_attention


@st.composite
def plans(draw: st.DrawFn) -> BlockPlan:
    """Any plan over ragged blocks, with lists that are wider than needed and spoiled past the count."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)))
    share = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(shape, generator=generator) < share
    lens = [draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) for n in shape[2:]]
    plan = BlockPlan.from_block_mask(mask, *map(offsets, lens))
    indices = torch.nn.functional.pad(plan.kv_indices, (0, draw(st.integers(0, 2))))
    past = torch.arange(indices.shape[-1]) >= plan.kv_num_blocks[..., None]
    return BlockPlan(plan.kv_num_blocks, indices.masked_fill(past, 2**30), plan.q_blocks, plan.kv_blocks).to(DEVICE)


sizes = st.integers(1, 4)


def tokens_read(plan: BlockPlan) -> Tensor:
    """bool [B|1, H|1, Sq, Skv]."""
    mask = plan.block_mask()
    for dim, blocks in ((2, plan.q_blocks), (3, plan.kv_blocks)):
        mask = mask.repeat_interleave(torch.tensor(blocks.lens, device=DEVICE), dim=dim)
    return mask


def groups(mask: Tensor, dim: int, size: int) -> Tensor:
    return torch.stack([part.any(dim) for part in mask.split(size, dim)], dim)


@given(plans(), sizes, sizes)
def test_a_group_reads_what_any_of_it_reads(plan: BlockPlan, q: int, kv: int) -> None:
    coarse = plan.coarsen(q, kv)
    coarse.validate()
    assert torch.equal(coarse.block_mask(), groups(groups(plan.block_mask(), 2, q), 3, kv))
    assert coarse.kv_indices.shape[-1] <= q * plan.kv_indices.shape[-1]
    assert coarse.q_blocks.lens == tuple(sum(part) for part in split(plan.q_blocks.lens, q))
    assert coarse.kv_blocks.lens == tuple(sum(part) for part in split(plan.kv_blocks.lens, kv))


def split(lens: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [lens[i : i + size] for i in range(0, len(lens), size)]


@given(plans(), sizes, sizes)
def test_coarsening_loses_no_pair_and_inflation_counts_those_added(plan: BlockPlan, q: int, kv: int) -> None:
    coarse = plan.coarsen(q, kv)
    before, after = tokens_read(plan), tokens_read(coarse)
    assert not (before & ~after).any()
    if before.any():
        assert coarse.inflation(plan) == pytest.approx(int(after.sum()) / int(before.sum()))
        assert coarse.inflation(plan) >= 1


@given(plans(), sizes, sizes)
def test_refining_what_was_coarsened(plan: BlockPlan, q: int, kv: int) -> None:
    """It has the blocks of the plan again and computes what the coarse plan computes."""
    coarse = plan.coarsen(q, kv)
    fine = coarse.refine(plan.q_blocks, plan.kv_blocks)
    fine.validate()
    assert (fine.q_blocks, fine.kv_blocks) == (plan.q_blocks, plan.kv_blocks)
    assert torch.equal(tokens_read(fine), tokens_read(coarse))
    assert torch.equal((fine | plan).block_mask(), fine.block_mask())
    assert torch.equal(fine.coarsen(q, kv).block_mask(), coarse.block_mask())
    if coarse.cost:
        assert fine.inflation(coarse) == 1


@given(plans(), st.data())
def test_refining_changes_no_pair_of_tokens(plan: BlockPlan, data: st.DataObject) -> None:
    smaller = []
    for blocks in (plan.q_blocks, plan.kv_blocks):
        cuts = data.draw(st.sets(st.integers(1, max(1, blocks.num_tokens - 1))))
        smaller.append(sorted({*blocks.on(torch.device("cpu")).tolist(), *(c for c in cuts if c < blocks.num_tokens)}))
    fine = plan.refine(*smaller)
    fine.validate()
    assert [fine.q_offsets.tolist(), fine.kv_offsets.tolist()] == smaller
    assert torch.equal(tokens_read(fine), tokens_read(plan))
    assert fine.cost == plan.cost
    assert torch.equal(plan.refine().block_mask(), plan.block_mask())


def test_attention_over_refined_blocks_is_the_same() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)[None, None]
    plan = BlockPlan.from_block_mask(mask, [0, 9, 12], [0, 4, 9, 12])
    q, k, v = torch.randn(3, 1, 12, 2, 16, dtype=torch.float64).unbind(0)
    out = block_sparse_attention(q, k, v, plan)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan.refine([0, 4, 9, 10, 12], [0, 2, 4, 9, 12])), out)


def test_inflation_of_plans_that_broadcast() -> None:
    plan = BlockPlan.from_block_mask(torch.eye(4, dtype=torch.bool)[None, None], *[[0, 2, 4, 6, 8]] * 2)
    coarse = plan.coarsen(q=2)
    assert coarse.inflation(plan) == 2
    repeated = BlockPlan(plan.kv_num_blocks.expand(2, 3, 4), plan.kv_indices.expand(2, 3, 4, 1), *[plan.q_blocks] * 2)
    assert coarse.inflation(repeated) == 2


def test_what_cannot_be_is_refused() -> None:
    plan = BlockPlan.dense([0, 4, 9], [0, 3, 6])
    for name, sizes in (("q", (0, 1)), ("kv", (1, -1)), ("kv", (1, 1.5))):
        with pytest.raises(PlanError, match=f"^{name} must be a number of neighbouring blocks >= 1"):
            plan.coarsen(*sizes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="has no border at token 4"):
        plan.refine([0, 5, 9])
    with pytest.raises(PlanError, match="has no border at token 6"):
        plan.refine(kv_offsets=[0, 3, 5])
    with pytest.raises(PlanError, match="has no border at token 6"):
        plan.refine(kv_offsets=[0, 3, 6, 7])
    with pytest.raises(PlanError, match="over the same tokens"):
        plan.inflation(BlockPlan.dense([0, 4, 8], [0, 3, 6]))
    nothing = BlockPlan.from_block_mask(torch.zeros(1, 1, 2, 2, dtype=torch.bool), [0, 4, 9], [0, 3, 6])
    with pytest.raises(PlanError, match="0 token pairs in the second"):
        plan.inflation(nothing)
