"""One summary vector per block."""

from __future__ import annotations

import torch
from torch import Tensor

from openvsa.errors import ShapeError
from openvsa.layout import BlockOffsets

__all__ = ["pool_mean"]


def pool_mean(x: Tensor, blocks: BlockOffsets) -> Tensor:
    """The mean of each block's tokens, however many it has: x [B, S, H, D] in block order to [B, N, H, D].

    Computed and returned in fp32 (fp64 for fp64 input), because rounding the summaries makes ties that decide which
    blocks are kept. Differentiable, deterministic.

    Raises:
        ShapeError: x does not have the tokens that `blocks` describe.
    """
    if x.dim() != 4 or x.shape[1] != blocks.num_tokens:
        raise ShapeError(f"x must be [B, {blocks.num_tokens}, H, D] for {blocks}, got shape {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    size = blocks.uniform_len
    if size is not None and blocks.num_tokens % size == 0:
        return x.unflatten(1, (blocks.num_blocks, size)).mean(2)
    lens = blocks.lens_on(x.device)[:, None]
    filled = torch.arange(blocks.max_len, device=x.device) < lens
    slots = x.index_select(1, blocks.padded_slots(x.device).flatten())
    slots = slots.unflatten(1, (blocks.num_blocks, blocks.max_len))
    return torch.where(filled[..., None, None], slots, 0.0).sum(2) / lens[..., None]
