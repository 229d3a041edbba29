"""The one op and what runs it."""

from openvsa.ops.attention import block_sparse_attention
from openvsa.ops.merge import merge

__all__ = ["block_sparse_attention", "merge"]
