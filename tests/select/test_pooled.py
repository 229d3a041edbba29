"""The selection rule of VSA."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers import DEVICE
from openvsa import BlockPlan, Budget, TileLayout
from openvsa.select import PooledTopK, pooled_scores

LAYOUT = TileLayout((3, 5, 6), (2, 2, 4))
WITH_TEXT = TileLayout((3, 5, 6), (2, 2, 4), prefix=20, suffix=3)


def qk(
    layout: TileLayout, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, layout.num_tokens)
    q, k = (torch.randn(*shape, h, 8, generator=generator).to(DEVICE, dtype) for h in (heads, kv_heads))
    return q, k


def tile_scores(q: Tensor, k: Tensor, layout: TileLayout) -> Tensor:
    """Mean query of a tile times mean key of a tile, tile by tile."""
    starts = layout.block_offsets.tolist()
    tiles = range(layout.num_blocks)[layout.tile_blocks]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    q_mean, k_mean = (torch.stack([x[:, starts[i] : starts[i + 1]].mean(1) for i in tiles], 1) for x in (q, k))
    return torch.stack([torch.stack([(a * b).sum(-1) for b in k_mean.unbind(1)], -1) for a in q_mean.unbind(1)], 2)


@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("kept", [1, 3, 9])
def test_it_keeps_the_tiles_whose_means_score_highest(layout: TileLayout, kept: int) -> None:
    q, k = qk(layout)
    plan = PooledTopK()(q, k, layout, Budget(top_k=kept))
    assert plan.device.type == DEVICE.type
    assert plan.q_blocks == plan.kv_blocks == layout.blocks
    scores = tile_scores(q.double(), k.double(), layout)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept).indices, True)
    tiles = layout.tile_blocks
    assert torch.equal(plan.block_mask()[..., tiles, tiles], best)


def test_text_reads_and_is_read_by_everything() -> None:
    q, k = qk(WITH_TEXT)
    mask = PooledTopK()(q, k, WITH_TEXT, Budget(top_k=1)).block_mask()
    text = list(WITH_TEXT.text_blocks)
    assert mask[..., text].all()
    assert mask[:, :, text].all()
    tiles = WITH_TEXT.tile_blocks
    assert (mask[..., tiles, tiles].sum(-1) == 1).all(), "text competes for the budget of tiles"


@pytest.mark.parametrize("q_tiles", [(), (1, 2, 2)], ids=["tiles", "boxes"])
@pytest.mark.parametrize("budget", [Budget(top_k=2), Budget(top_p=0.6), Budget(top_p=1)], ids=str)
def test_text_changes_nothing_about_the_tiles(budget: Budget, q_tiles: tuple[int, ...]) -> None:
    """Also where rows keep different numbers of tiles, as with top_p."""
    layout, alone = (TileLayout((3, 5, 6), (2, 2, 4), prefix, suffix, q_tiles) for prefix, suffix in ((20, 3), (0, 0)))
    q, k = qk(layout)
    plan = PooledTopK()(q, k, layout, budget)
    without = PooledTopK()(q[:, 20:-3], k[:, 20:-3], alone, budget)
    rows, tiles = layout.q_tile_blocks, layout.tile_blocks
    plan.validate()
    assert torch.equal(plan.block_mask()[..., rows, tiles], without.block_mask())
    text = layout.num_blocks - layout.num_tiles
    assert torch.equal(plan.kv_num_blocks[..., rows], without.kv_num_blocks + text)
    counts = without.kv_num_blocks
    assert (counts.min() < counts.max()) == (budget.top_p == 0.6)


def test_means_that_are_at_hand_give_the_same_plan() -> None:
    q, k = qk(LAYOUT)
    rule = PooledTopK()
    blocks = list(pairwise(LAYOUT.block_offsets.tolist()))
    q_mean, k_mean = (torch.stack([x[:, a:b].mean(1) for a, b in blocks], 1) for x in (q, k))
    ours = rule.plan(q_mean, k_mean, LAYOUT, Budget(top_k=3))
    assert torch.equal(ours.block_mask(), rule(q, k, LAYOUT, Budget(top_k=3)).block_mask())


def test_scale_matters_for_top_p_only() -> None:
    q, k = qk(LAYOUT)
    flat, steep = PooledTopK(scale=0.01), PooledTopK(scale=100.0)

    def kept(rule: PooledTopK, budget: Budget) -> BlockPlan:
        return rule(q, k, LAYOUT, budget)

    same = Budget(top_k=3)
    assert torch.equal(kept(flat, same).block_mask(), kept(steep, same).block_mask())
    assert kept(flat, Budget(top_p=0.5)).density > 2 * kept(steep, Budget(top_p=0.5)).density


def test_length_bias_counts_the_tokens_of_a_tile() -> None:
    """A key tile that scores a little higher but holds fewer tokens loses once its length counts."""
    layout = TileLayout((6,), (4,))  # a tile of 4 tokens and one of 2
    q = torch.ones(1, 6, 1, 1, device=DEVICE)
    k = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.5, 1.5], device=DEVICE)[None, :, None, None]
    for bias, kept in ((False, 1), (True, 0)):
        plan = PooledTopK(scale=1.0, length_bias=bias)(q, k, layout, Budget(top_k=1))
        assert (plan.kv_indices == kept).all()


def test_low_precision_input_is_scored_in_fp32() -> None:
    q, k = qk(LAYOUT, dtype=torch.bfloat16)
    ours = PooledTopK()(q, k, LAYOUT, Budget(top_k=3))
    exact = PooledTopK()(q.float(), k.float(), LAYOUT, Budget(top_k=3))
    assert torch.equal(ours.block_mask(), exact.block_mask())


def test_the_choice_is_deterministic_and_carries_no_gradient() -> None:
    q, k = (x.requires_grad_() for x in qk(LAYOUT))
    first, second = (PooledTopK()(q, k, LAYOUT, Budget(keep_ratio=0.3)) for _ in range(2))
    assert torch.equal(first.kv_indices, second.kv_indices)
    assert not first.kv_indices.requires_grad


def test_pooled_scores_with_grouped_heads() -> None:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 3, 2, 8)
    scores = pooled_scores(q, k, 1 / math.sqrt(8))
    assert scores.shape == (2, 4, 5, 3)
    for head in range(4):
        expected = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / math.sqrt(8)
        torch.testing.assert_close(scores[:, head], expected)
