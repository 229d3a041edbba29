"""Video sparse attention as a function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openvsa.config import Budget
from openvsa.errors import ShapeError, UnsupportedError
from openvsa.layout import TileLayout
from openvsa.layout.tile import check_layout
from openvsa.ops import block_sparse_attention
from openvsa.ops.attention import attend, check_qkv, scale_of
from openvsa.plan.rank import row_chunks
from openvsa.select import PooledTopK, Selector, pooled_scores
from openvsa.select.pool import permute_pool_all, unpermute_add, weighted_product
from openvsa.select.pooled import product
from openvsa.torch_op import check_visible

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
        ShapeError: tensors do not fit each other or the layout, or scale is not a finite number.
        BudgetError: the budget cannot hold the blocks it must always keep.
        UnsupportedError: no backend (or not the one named) can run it.
    """
    check_visible("video sparse attention")
    check_qkv(q, k, v)
    check_layout(layout)
    if q.shape[1] != layout.num_tokens == q.shape[2]:
        raise ShapeError(
            f"q, k and v must be [batch, seq, heads, head_dim], and dimension 2 of q {list(q.shape)} has the "
            f"{layout.num_tokens} tokens of the layout; give them as q.transpose(1, 2)"
        )
    layout.check("q", q.shape[1])
    layout.check("k", k.shape[1])
    if branch_weight is not None:
        _check_weight(branch_weight, (*q.shape[:3], v.shape[3]), q.device)
    scale = scale_of(scale, q.shape[-1])
    same_scale = selector is None
    selector = PooledTopK(scale) if selector is None else selector
    ours = type(selector) is PooledTopK
    if not ours and (not callable(selector) or isinstance(selector, type)):
        raise UnsupportedError(f"selector must be an object to call, such as PooledTopK(), got {selector!r}")
    # Means come with the permutation, in one pass, where something needs them.
    branch = branch_weight is not None
    (q, k, v), pooled = permute_pool_all(q, k, v, layout, pool=ours or branch)
    if pooled is not None and (layout.prefix or layout.suffix):
        tiles = layout.tile_blocks
        q_pooled, k_pooled, v_pooled = pooled
        pooled = q_pooled[:, layout.q_tile_blocks], k_pooled[:, tiles], v_pooled[:, tiles]
    scores = plan = None
    if ours:
        assert pooled is not None
        # Both branches start from the same scores; kept only where all of them may exist at a time.
        if branch and same_scale and len(_chunks(*pooled[:2])) == 1:
            scores = pooled_scores(*pooled[:2], scale)
        plan = selector.plan(*pooled[:2], layout, budget, scores)
    compressed = promised = None
    if branch_weight is not None:
        assert pooled is not None
        compressed = compressed_attention(*pooled, scale) if scores is None else _average(scores, pooled[2])
        promised = weighted_product(branch_weight, compressed, layout, q.dtype)
    if plan is not None:
        out = attend(q, k, v, plan, scale, backend)
    else:
        out = block_sparse_attention(q, k, v, selector(q, k, layout, budget), scale=scale, backend=backend)
    if branch_weight is None or compressed is None:
        return layout.unpermute(out)
    return unpermute_add(out, layout, branch_weight, compressed, promised)


def compressed_attention(q_pooled: Tensor, k_pooled: Tensor, v_pooled: Tensor, scale: float) -> Tensor:
    """Attention between tile means: q_pooled [B, NQ, H, D], k_pooled [B, NK, Hkv, D], v_pooled [B, NK, Hkv, Dv] to
    [B, NQ, H, Dv], in the dtype of the means. Tiles count alike, however many tokens they hold (VSA, section 2.2).

    At most `openvsa.plan.rank.MAX_SCORES` scores exist at a time, here and in the backward pass.
    """
    chunks = _chunks(q_pooled, k_pooled)
    if len(chunks) == 1:
        return _compressed_rows(q_pooled, k_pooled, v_pooled, scale)
    # Backward computes the scores of a chunk again: kept, they would all exist at a time.
    rows = [
        checkpoint(
            _compressed_rows, q_pooled[:, start:stop], k_pooled, v_pooled, scale,
            use_reentrant=False, preserve_rng_state=False,
        )
        for start, stop in chunks
    ]  # fmt: skip
    return torch.cat(rows, 1)


def _check_weight(weight: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(weight, Tensor) or weight.shape != shape or weight.device != device:
        got = f"{tuple(weight.shape)} on {weight.device}" if isinstance(weight, Tensor) else repr(weight)
        raise ShapeError(f"branch_weight must be [B, S, H, D] = {shape} on {device} like the output, got {got}")
    if not weight.is_floating_point():
        raise ShapeError(f"branch_weight must have a floating dtype, got {weight.dtype}")


def _chunks(q_pooled: Tensor, k_pooled: Tensor) -> list[tuple[int, int]]:
    batch, num_q, heads, _ = q_pooled.shape
    return row_chunks(num_q, batch * heads * k_pooled.shape[1])


def _compressed_rows(q_pooled: Tensor, k_pooled: Tensor, v_pooled: Tensor, scale: float) -> Tensor:
    return _average(pooled_scores(q_pooled, k_pooled, scale), v_pooled)


def _average(scores: Tensor, v_pooled: Tensor) -> Tensor:
    """[B, NQ, H, Dv]: the softmax of scores [B, H, NQ, NK] over v_pooled [B, NK, Hkv, Dv]."""
    batch, heads, num_q, _ = scores.shape
    p = scores.softmax(-1)
    if heads == v_pooled.shape[2]:
        return product(p, v_pooled.transpose(1, 2)).transpose(1, 2)
    p = p.unflatten(1, (v_pooled.shape[2], -1)).flatten(2, 3)
    return product(p, v_pooled.transpose(1, 2)).reshape(batch, heads, num_q, -1).transpose(1, 2)
