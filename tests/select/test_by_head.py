"""A budget for every head: each head gets what the selector chooses for it alone."""

from __future__ import annotations

import pytest
import torch

from openvsa import Budget, TileLayout, block_sparse_attention
from openvsa.errors import BudgetError
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, select_by_head


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("text", [0, 5])
def test_every_head_has_the_plan_of_its_own_budget(kv_heads: int, text: int) -> None:
    layout = TileLayout(grid=(3, 5, 7), tile=(2, 2, 4), prefix=text)
    q, k = torch.randn(2, layout.num_tokens, 4, 8), torch.randn(2, layout.num_tokens, kv_heads, 8)
    budgets = [Budget(top_k=2), Budget(top_k=5), Budget(top_k=2), Budget(top_p=0.9)]
    plan = select_by_head(PooledTopK(), q, k, layout, budgets)
    for head, budget in enumerate(budgets):
        at = head * kv_heads // 4
        alone = PooledTopK()(q[:, :, head : head + 1], k[:, :, at : at + 1], layout, budget)
        assert torch.equal(plan.block_mask()[:, head], alone.block_mask()[:, 0])
    kept = plan.kv_num_blocks[:, 1, -1]
    assert torch.equal(kept, torch.full_like(kept, 5 + (text > 0)))
    assert block_sparse_attention(q, k, k, plan).isfinite().all()


def test_one_budget_for_all_heads_is_the_selector_itself() -> None:
    layout = TileLayout(grid=(4, 6), tile=(2, 2))
    q, k = torch.randn(2, 1, layout.num_tokens, 3, 8)
    half = Budget(keep_ratio=0.5)
    for budgets in ([half] * 3, half):
        plan = select_by_head(PooledTopK(), q, k, layout, budgets)
        assert torch.equal(plan.block_mask(), PooledTopK()(q, k, layout, half).block_mask())


def test_a_selector_with_one_plan_for_all_heads_and_samples() -> None:
    layout = TileLayout(grid=(4, 6), tile=(2, 2))

    def leading(q: torch.Tensor, k: torch.Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        keep = torch.arange(layout.num_blocks) < budget.blocks(layout.num_blocks)
        mask = keep.expand(1, 1, layout.num_blocks, -1)
        return BlockPlan.from_block_mask(mask, layout.blocks, layout.blocks)

    q, k = torch.randn(2, 2, layout.num_tokens, 3, 8)
    plan = select_by_head(leading, q, k, layout, [Budget(top_k=n) for n in (1, 4, 1)])
    assert plan.kv_num_blocks[0, :, 0].tolist() == [1, 4, 1]


def test_a_missing_budget_is_refused() -> None:
    layout = TileLayout(grid=(4, 6), tile=(2, 2))
    q, k = torch.randn(2, 1, layout.num_tokens, 3, 8)
    with pytest.raises(BudgetError, match="each of the 3 heads, got 2"):
        select_by_head(PooledTopK(), q, k, layout, [Budget(top_k=1)] * 2)
