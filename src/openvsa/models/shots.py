"""Learned tokens, a few per shot, that tell the model which shot it continues."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["UNKNOWN_SHOT", "ShotTokens"]

UNKNOWN_SHOT = 0


class ShotTokens(ModelMixin, ConfigMixin):
    """A table of `num_tokens` vectors per shot. Row 0 stands for a shot that the model has not been told about."""

    @register_to_config
    def __init__(self, num_rows: int, num_tokens: int = 8, dim: int = 64) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_rows, num_tokens, dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Tokens `[B, num_tokens, dim]` of the rows `[B]` (int64)."""
        return self.table[rows]
