"""What every selector is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from openvsa.config import Budget
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan

__all__ = ["Selector"]


class Selector(Protocol):
    """A rule that decides which key blocks each query block reads.

    Any callable of this form is one: a function, or an object that holds settings. It must return a plan of
    `layout.q_blocks` over `layout.blocks` (or of `layout.blocks` over themselves: a query block is a run of them), on
    the device of q, and should do so without waiting for the device.
    """

    def __call__(self, q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        """Choose blocks for q [B, S, H, D] and k [B, S, Hkv, D], both in block order (after QK-norm and RoPE)."""
        ...
