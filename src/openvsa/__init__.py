"""Trainable sparse attention for video diffusion transformers and other long-sequence models.

Importing this package imports torch and nothing optional. Names that need more (Diffusers, say) load it when they
are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openvsa import nn
from openvsa.config import Budget
from openvsa.errors import (
    BudgetError,
    MissingExtraError,
    OpenVSAError,
    PlanError,
    ShapeError,
    UnsupportedError,
)
from openvsa.layout import TileLayout
from openvsa.nn.functional import video_sparse_attention
from openvsa.ops import block_sparse_attention, merge
from openvsa.plan import BlockPlan

if TYPE_CHECKING:
    from openvsa.integrations.config import SparsityConfig
    from openvsa.integrations.diffusers import sparsify

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
    "Budget",
    "BudgetError",
    "MissingExtraError",
    "OpenVSAError",
    "PlanError",
    "ShapeError",
    "SparsityConfig",
    "TileLayout",
    "UnsupportedError",
    "block_sparse_attention",
    "merge",
    "nn",
    "sparsify",
    "video_sparse_attention",
]

_LAZY = {"SparsityConfig": "openvsa.integrations.config", "sparsify": "openvsa.integrations.diffusers"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'openvsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
