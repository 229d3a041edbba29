"""Selectors: from queries and keys to a block plan under a budget."""

from openvsa.select.base import Selector
from openvsa.select.by_head import select_by_head
from openvsa.select.pool import pool_mean
from openvsa.select.pooled import PooledTopK, pooled_scores
from openvsa.select.released import ReleasedVSA
from openvsa.select.table import BudgetTable

__all__ = [
    "BudgetTable",
    "PooledTopK",
    "ReleasedVSA",
    "Selector",
    "pool_mean",
    "pooled_scores",
    "select_by_head",
]
