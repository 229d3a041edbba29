"""Selectors: from queries and keys to a block plan under a budget."""

from openvsa.select.base import Selector
from openvsa.select.pool import permute_pool, pool_mean, spread, unpermute_add
from openvsa.select.pooled import PooledTopK, pooled_scores

__all__ = ["PooledTopK", "Selector", "permute_pool", "pool_mean", "pooled_scores", "spread", "unpermute_add"]
