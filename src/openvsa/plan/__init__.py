"""Block plans: which key blocks each query block reads."""

from openvsa.plan.block_plan import BlockPlan
from openvsa.plan.rank import rank

__all__ = ["BlockPlan", "rank"]
