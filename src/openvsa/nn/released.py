"""VSA in the order and with the rounding of its authors, for the weights they released."""

from __future__ import annotations

import torch
from torch import Tensor

from openvsa.errors import ShapeError
from openvsa.layout import TileLayout
from openvsa.layout.tile import check_layout
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select.pool import spread
from openvsa.select.released import ReleasedVSA

__all__ = ["released_attention"]


def released_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    branch_weight: Tensor,
    layout: TileLayout,
    method: ReleasedVSA,
    *,
    backend: str = "auto",
) -> tuple[Tensor, BlockPlan]:
    """Sparse branch + branch_weight * compressed branch, rounded to the dtype of q where the authors' code rounds:
    tile means, scores (twice), softmax, compressed branch, its product with the weight, the sum.

    `openvsa.video_sparse_attention` computes the same formula more exactly; this is what released weights were trained
    with. All N x N scores of a call exist at a time, as in the authors' code.

    Args:
        q, k, v: [B, S, H, D] in block order, after QK-norm and RoPE.
        branch_weight: [B, S, H, D] in block order.
        layout: the lattice of the S tokens in tiles of 4 x 4 x 4.
        method: how many tiles are kept.
        backend: as in `openvsa.block_sparse_attention`.

    Returns:
        The attention [B, S, H, D] in block order, and the plan of its sparse branch.

    Raises:
        ShapeError: shapes or dtypes differ, or the layout is not one that `method` allows.
    """
    for name, x in (("k", k), ("v", v), ("branch_weight", branch_weight)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ShapeError(
                f"{name} must be like q, {tuple(q.shape)} of {q.dtype}, got {tuple(x.shape)} of {x.dtype}; the "
                "released VSA weights have as many key heads as query heads"
            )
    check_layout(layout)
    layout.check("q", q.shape[1])
    scores = method.scores(method.means(q, layout), method.means(k, layout))
    plan = method.plan(scores, layout)
    sparse = block_sparse_attention(q, k, v, plan, backend=backend)
    # Under autocast softmax would come out in fp32.
    with torch.autocast(q.device.type, enabled=False):
        compressed = scores.softmax(-1) @ method.means(v, layout).transpose(1, 2)
    return spread(compressed.transpose(1, 2), layout.blocks) * branch_weight + sparse, plan
