"""Video sparse attention as a function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import ShapeError
from openvsa.layout import TileLayout
from openvsa.ops import block_sparse_attention
from openvsa.ops.attention import check_qkv
from openvsa.select import PooledTopK, Selector, pool_mean, pooled_scores, spread

__all__ = ["compressed_attention", "video_sparse_attention"]


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    budget: Budget,
    branch_weight: Tensor | None = None,
    *,
    selector: Selector | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Video sparse attention (VSA, arXiv 2505.13389): sparse branch + branch_weight * compressed branch.

    The sparse branch is exact attention of each tile's queries over the tokens of the key tiles that the selector
    keeps; the compressed branch is attention between tile means, one output row for all tokens of a tile. Gradients
    flow through both, not through the choice of tiles. At keep_ratio 1 without branch weight this is dense
    attention. Text tokens of the layout (prefix, suffix) read and are read by everything, and have no compressed
    branch.

    Args:
        q: [B, S, H, D] in raster order, after QK-norm and RoPE.
        k, v: [B, S, Hkv, D] in raster order, with H a multiple of Hkv.
        layout: the lattice of the S tokens.
        budget: how many key tiles each query tile keeps.
        branch_weight: [B, S, H, D], the learned weight of the compressed branch; None leaves that branch out.
        selector: how tiles are chosen; None means PooledTopK(), the rule of the paper.
        scale: multiplies q·k in both branches and in the scores; None means 1 / sqrt(D).
        backend: as in `block_sparse_attention`.

    Returns:
        [B, S, H, D] in raster order, in the dtype of q.

    Raises:
        ShapeError: tensors do not fit each other or the layout.
        BudgetError: the budget cannot hold the blocks it must always keep.
        UnsupportedError: no backend (or not the one named) can run it.
    """
    check_qkv(q, k, v)
    layout.check("q", q.shape[1])
    layout.check("k", k.shape[1])
    if branch_weight is not None and branch_weight.shape != (*q.shape[:3], v.shape[3]):
        raise ShapeError(
            f"branch_weight must be [B, S, H, D] = {(*q.shape[:3], v.shape[3])} like the output, got "
            f"{tuple(branch_weight.shape)}"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    q, k, v = (layout.permute(x) for x in (q, k, v))
    if branch_weight is None:
        plan = (selector or PooledTopK(scale))(q, k, layout, budget)
        return layout.unpermute(block_sparse_attention(q, k, v, plan, scale=scale, backend=backend))

    tiles = layout.tile_blocks
    q_pooled, k_pooled, v_pooled = (pool_mean(x, layout.blocks)[:, tiles] for x in (q, k, v))
    if selector is None:
        plan = PooledTopK(scale).plan(q_pooled, k_pooled, layout, budget)
    else:
        plan = selector(q, k, layout, budget)
    out = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
    compressed = compressed_attention(q_pooled, k_pooled, v_pooled, scale).to(out.dtype)
    text_before, text_after = tiles.start, layout.num_blocks - tiles.stop
    compressed = torch.nn.functional.pad(compressed, (0, 0, 0, 0, text_before, text_after))
    compressed = layout.permute(branch_weight) * spread(compressed, layout.blocks)
    return layout.unpermute((out + compressed).to(out.dtype))


def compressed_attention(q_pooled: Tensor, k_pooled: Tensor, v_pooled: Tensor, scale: float) -> Tensor:
    """Attention between tile means: q_pooled [B, N, H, D], k_pooled [B, N, Hkv, D], v_pooled [B, N, Hkv, Dv] to
    [B, N, H, Dv], in the dtype of the means. Tiles count alike, however many tokens they hold (VSA, section 2.2)."""
    p = pooled_scores(q_pooled, k_pooled, scale).softmax(-1)
    v_pooled = v_pooled.repeat_interleave(q_pooled.shape[2] // v_pooled.shape[2], dim=2)
    with torch.autocast(p.device.type, enabled=False):
        return torch.einsum("bhqn,bnhd->bqhd", p, v_pooled)
