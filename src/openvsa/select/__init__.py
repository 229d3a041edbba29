"""Selectors: from queries and keys to a block plan under a budget."""

from openvsa.select.base import Selector
from openvsa.select.by_head import select_by_head
from openvsa.select.pool import (
    permute_pool,
    permute_pool_all,
    pool_mean,
    spread,
    unpermute_add,
    weighted_product,
)
from openvsa.select.pooled import PooledTopK, pooled_scores
from openvsa.select.released import ReleasedVSA
from openvsa.select.table import BudgetTable

__all__ = [
    "BudgetTable",
    "PooledTopK",
    "ReleasedVSA",
    "Selector",
    "permute_pool",
    "permute_pool_all",
    "pool_mean",
    "pooled_scores",
    "select_by_head",
    "spread",
    "unpermute_add",
    "weighted_product",
]
