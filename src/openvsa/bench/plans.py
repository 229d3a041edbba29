"""Plans to measure with: random ones, the worst case, and ones whose neighbours agree as those of real models do."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openvsa.config import Budget
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, pool_mean, pooled_scores

__all__ = ["PATTERNS", "make_plan", "recorded_overlap", "shared_with_next", "smooth_queries_and_keys"]

PATTERNS = {
    "random": "key blocks drawn independently for every query block: neighbours share no more than chance",
    "clustered": "eight query blocks in a row draw on one ranking, with a little noise each",
    "model": "the pooled top-k selector on smooth fields over the lattice; neighbours share what they do in a model",
}
_CLUSTER = 8
_CLUSTER_NOISE = 0.3
# Tokens between the nodes of a field, in sides of a 64-token tile. The wider, the more neighbours can share before
# noise is added; at 8 that is about what the best recorded head shares, and more than 8 adds nothing.
_NODE_SPACING = 8
_BISECTIONS = 14
_OVERLAP_FILE = Path(__file__).parent / "overlap.json"


def make_plan(pattern: str, q: Tensor, k: Tensor, layout: TileLayout, density: float, seed: int = 0) -> BlockPlan:
    """A plan over q [B, S, H, D] and k [B, S, Hkv, D] in block order.

    Every query block of the lattice keeps ceil(density * tiles) key tiles; text blocks read and are read by all.
    Only "model" looks at the values of q and k, which then come from `smooth_queries_and_keys`.
    """
    budget = Budget(keep_ratio=density)
    if pattern == "model":
        return PooledTopK()(q, k, layout, budget)
    rows, tiles = layout.q_tile_blocks, layout.tile_blocks
    num_q = rows.stop - rows.start
    shape = (q.shape[0], q.shape[2], num_q, layout.num_tiles)
    generator = torch.Generator(q.device).manual_seed(seed)
    scores = torch.rand(shape, generator=generator, device=q.device)
    if pattern == "clustered":
        shared = torch.rand(*shape[:2], -(-num_q // _CLUSTER), shape[3], generator=generator, device=q.device)
        scores = shared.repeat_interleave(_CLUSTER, dim=2)[:, :, :num_q] + _CLUSTER_NOISE * scores
    if not layout.text_blocks:
        return BlockPlan.from_scores(scores, budget, layout.q_blocks, layout.blocks)
    # Text competes with nothing: it comes on top of the budget, and its rows read everything.
    kept = budget.blocks(layout.num_tiles) + len(layout.text_blocks)
    everywhere = scores.new_full((*shape[:2], layout.q_blocks.num_blocks, layout.num_blocks), float("inf"))
    everywhere[..., rows, tiles] = scores
    plan = BlockPlan.from_scores(everywhere, Budget(top_k=kept), layout.q_blocks, layout.blocks)
    return plan.with_dense_blocks(rows=(*range(rows.start), *range(rows.stop, layout.q_blocks.num_blocks)))


def shared_with_next(plan: BlockPlan) -> Tensor:
    """The mean share of a query block's key blocks that the next query block reads too, fp32 [B|1, H|1]."""
    mask = plan.block_mask()
    both = (mask[:, :, 1:] & mask[:, :, :-1]).sum(-1)
    return (both / mask[:, :, :-1].sum(-1).clamp_min(1)).mean(-1)


@cache
def recorded_overlap() -> tuple[tuple[float, ...], float]:
    """What the heads of a real model share with their next query block, ascending, and the density at which it was
    recorded. The file comes from scripts/record_overlap.py."""
    found = json.loads(_OVERLAP_FILE.read_text())
    return tuple(sorted(share for layer in found["shared_with_next"] for share in layer)), found["density"]


def smooth_queries_and_keys(
    layout: TileLayout, batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D] and k [B, S, Hkv, D], fp32 of variance 1, in raster order: fields that queries and keys have in
    common and that vary slowly over the lattice, plus noise of each token. The noise of a head is what makes the
    plans of the pooled top-k selector share as much between neighbours as a recorded head; heads are spread evenly
    over the recorded ones. Text tokens are noise alone."""
    generator = torch.Generator(device).manual_seed(seed)
    fit = TileLayout.fit(layout.grid)
    field = _field(fit, kv_heads * head_dim, generator, device).view(-1, kv_heads, head_dim)
    field = field[None].expand(batch, -1, -1, -1)
    groups = heads // kv_heads
    fields = field.repeat_interleave(groups, dim=2), field
    noises = [torch.randn(x.shape, generator=generator, device=device) for x in fields]
    noise = _calibrate(fit, fields, noises, heads)

    found = []
    for smooth, rough, level in zip(fields, noises, (noise, noise[::groups]), strict=True):
        x = (smooth + level[:, None] * rough) / (1 + level[:, None].square()).sqrt()
        before, after = (
            torch.randn(batch, n, *x.shape[2:], generator=generator, device=device)
            for n in (layout.prefix, layout.suffix)
        )
        found.append(torch.cat([before, x, after], dim=1))
    return found[0], found[1]


def _field(fit: TileLayout, channels: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal noise on a coarse lattice, interpolated: [S, channels], mean 0 and variance 1."""
    nodes = [max(2, math.ceil(g / (_NODE_SPACING * t)) + 1) for g, t in zip(fit.grid, fit.tile, strict=True)]
    coarse = torch.randn(1, channels, *nodes, generator=generator, device=device)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(nodes)]
    fine = interpolate(coarse, size=fit.grid, mode=mode, align_corners=True)
    fine = fine.flatten(2)[0].t()
    return ((fine - fine.mean(0)) / fine.std(0)).contiguous()


def _calibrate(fit: TileLayout, fields: tuple[Tensor, Tensor], noises: list[Tensor], heads: int) -> Tensor:
    """The noise of each head, [H], by bisection: more noise, less shared. Pooling is linear, so it is done once."""
    recorded, density = recorded_overlap()
    device = fields[0].device
    at = [round(h * (len(recorded) - 1) / max(heads - 1, 1)) for h in range(heads)]
    wanted = torch.tensor([recorded[i] for i in at], device=device)
    smooth, rough = ([pool_mean(fit.permute(x[:1]), fit.blocks) for x in xs] for xs in (fields, noises))
    groups = heads // fields[1].shape[2]
    # As log2; a key head has the noise of the first query head that reads it.
    low, high = (torch.full((heads,), x, device=device) for x in (-8.0, 8.0))
    budget = Budget(keep_ratio=density)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        level = middle.exp2()[:, None]
        q, k = smooth[0] + level * rough[0], smooth[1] + level[::groups] * rough[1]
        plan = BlockPlan.from_scores(pooled_scores(q, k, 1.0), budget, fit.blocks, fit.blocks)
        more = shared_with_next(plan)[0] > wanted
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low.exp2()
