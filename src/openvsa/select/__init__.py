"""Selectors: from queries and keys to a block plan under a budget."""

from openvsa.select.base import Selector
from openvsa.select.pool import pool_mean, spread
from openvsa.select.pooled import PooledTopK, pooled_scores

__all__ = ["PooledTopK", "Selector", "pool_mean", "pooled_scores", "spread"]
