"""A budget of its own for every head, with any selector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import BudgetError
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan
from openvsa.select.base import Selector

__all__ = ["select_by_head"]


def select_by_head(
    selector: Selector, q: Tensor, k: Tensor, layout: TileLayout, budgets: Budget | Sequence[Budget]
) -> BlockPlan:
    """The plan in which head h keeps what `selector` chooses for it under `budgets[h]`.

    The selector runs once for each distinct budget, on the heads that have it. The K of the plan is that of the
    largest budget. The host does not wait for the device.

    Args:
        selector, q, k, layout: as for a Selector: q [B, S, H, D] and k [B, S, Hkv, D] in block order.
        budgets: one for each of the H query heads, or one for all.

    Raises:
        BudgetError: there are not as many budgets as heads.
    """
    if isinstance(budgets, Budget):
        return selector(q, k, layout, budgets)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    if len(budgets) != heads:
        raise BudgetError(f"budgets by head need one for each of the {heads} heads, got {len(budgets)}")
    alike: dict[Budget, list[int]] = {}
    for head, budget in enumerate(budgets):
        alike.setdefault(budget, []).append(head)
    if len(alike) == 1:
        return selector(q, k, layout, budgets[0])

    plans: list[BlockPlan] = []
    of_head: dict[int, tuple[Tensor, Tensor]] = {}
    for budget, members in alike.items():
        plan = selector(_heads(q, members), _heads(k, [head // group for head in members]), layout, budget)
        plans.append(plan)
        for place, head in enumerate(members):
            place = min(place, plan.kv_num_blocks.shape[1] - 1)  # a plan may be one for all heads
            of_head[head] = plan.kv_num_blocks[:, place : place + 1], plan.kv_indices[:, place : place + 1]
    batch = max(plan.kv_num_blocks.shape[0] for plan in plans)
    width = max(plan.kv_indices.shape[-1] for plan in plans)
    counts = torch.cat([of_head[head][0].expand(batch, -1, -1) for head in range(heads)], 1)
    lists = [
        torch.nn.functional.pad(of_head[head][1], (0, width - of_head[head][1].shape[-1])) for head in range(heads)
    ]
    indices = torch.cat([one.expand(batch, -1, -1, -1) for one in lists], 1)
    return BlockPlan(counts, indices, plans[0].q_blocks, plans[0].kv_blocks)


def _heads(x: Tensor, members: list[int]) -> Tensor:
    """Some heads of x [B, S, H, D]: a view where they are neighbours."""
    if members == list(range(members[0], members[-1] + 1)):
        return x[:, :, members[0] : members[-1] + 1]
    return torch.stack([x[:, :, head] for head in members], 2)
