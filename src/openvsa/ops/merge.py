"""Attention over disjoint key sets, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openvsa.errors import ShapeError

__all__ = ["merge"]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets, from the attention over each.

    Each part is (out [B, S, H, D], lse [B, H, S]) as `block_sparse_attention(..., return_lse=True)` returns them; the
    result is such a pair again, so merging is associative and commutative up to rounding. A row that reads nothing
    in a part (lse -inf) takes nothing from it; one that reads nothing anywhere has out 0 and lse -inf. Weights are
    computed in fp32; out has the dtype of the parts. Differentiable in every out and lse.

    Raises:
        ShapeError: there is no part, or shapes or devices differ.
    """
    if not parts:
        raise ShapeError("merge needs at least one (out, lse) pair, got none")
    for out, lse in parts:
        alike = out.dim() == 4 and out.shape == parts[0][0].shape
        if not alike or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
            raise ShapeError(
                f"merge needs outs of one shape [B, S, H, D] and lses [B, H, S], got {tuple(out.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(parts[0][0].shape)} and {tuple(parts[0][1].shape)}"
            )
        here = out.device == lse.device == parts[0][0].device
        if not (here and out.is_floating_point() and lse.is_floating_point()):
            raise ShapeError(
                f"merge needs floating outs and lses on one device, got {out.dtype} on {out.device} and {lse.dtype} on "
                f"{lse.device} beside those on {parts[0][0].device}"
            )
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = (lses - top).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    weights = (weights / safe).transpose(2, 3).unsqueeze(-1)
    outs = torch.stack([out for out, _ in parts])
    out = (weights * outs).sum(0).to(parts[0][0].dtype)
    return out, (safe.log() + top).masked_fill(empty, float("-inf"))
