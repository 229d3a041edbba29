"""Query blocks of several tiles over key blocks of one: VSA against its formula, written out for each query block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers import DEVICE
from openvsa import BlockPlan, Budget, TileLayout, block_sparse_attention, video_sparse_attention
from openvsa.nn import VideoSparseAttention
from openvsa.select import PooledTopK

LAYOUTS = (
    TileLayout((4, 4, 8), (2, 2, 2), q_tiles=(1, 1, 2)),
    TileLayout((3, 5, 7), (2, 2, 2), q_tiles=(1, 2, 1)),
    TileLayout((3, 5, 7), (2, 2, 2), prefix=11, suffix=20, q_tiles=(1, 1, 2)),
    TileLayout((9,), (2,), suffix=3, q_tiles=(3,)),
)


def inputs(layout: TileLayout, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """q, k, v and branch weight in raster order, fp64."""
    return [
        torch.randn(2, layout.num_tokens, h, 8, dtype=torch.float64, device=DEVICE)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def by_definition(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, layout: TileLayout, top_k: int) -> Tensor:
    """VSA by section 6 of the design, one query block at a time; text reads and is read by everything."""
    scale = 1 / math.sqrt(q.shape[3])
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    order = layout.permutation.to(DEVICE)
    q_tokens, kv_tokens = order.split(layout.q_blocks.lens), order.split(layout.block_lens)
    tiles = range(layout.num_blocks)[layout.tile_blocks]
    k_mean, v_mean = (torch.stack([x[:, kv_tokens[j]].mean(1) for j in tiles], 1) for x in (k, v))
    out = torch.zeros_like(q)
    for i, rows in enumerate(q_tokens):
        of_the_lattice = i in range(len(q_tokens))[layout.q_tile_blocks]
        scores = torch.einsum("bhd,bnhd->bhn", q[:, rows].mean(1), k_mean) * scale
        compressed = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v_mean)
        best = scores.topk(min(top_k, len(tiles)), -1).indices
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                kept = [tiles[j] for j in best[b, h].tolist()] if of_the_lattice else list(tiles)
                read = torch.cat([kv_tokens[j] for j in (*kept, *layout.text_blocks)])
                p = (q[b, rows, h] @ k[b, read, h].T * scale).softmax(-1)
                out[b, rows, h] = p @ v[b, read, h]
                if of_the_lattice:
                    out[b, rows, h] += weight[b, rows, h] * compressed[b, h]
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_it_is_the_formula_forward_and_backward(layout: TileLayout, top_k: int) -> None:
    leaves = [x.requires_grad_() for x in inputs(layout)]
    expected = by_definition(*leaves, layout, top_k)
    found = video_sparse_attention(*leaves[:3], layout, Budget(top_k=top_k), leaves[3])
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.triton
def test_the_kernels_around_attention_agree_with_plain_torch() -> None:
    """In fp32 they permute, pool, rank and combine; in fp64 plain torch does."""
    layout = LAYOUTS[2]
    exact = inputs(layout)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        out = video_sparse_attention(*leaves[:3], layout, Budget(top_k=2), leaves[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_keeping_everything_is_dense_attention(layout: TileLayout) -> None:
    q, k, v, _ = inputs(layout)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(video_sparse_attention(q, k, v, layout, Budget(keep_ratio=1.0)), dense)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_plan_is_over_the_query_blocks_of_the_layout(layout: TileLayout) -> None:
    q, k, _, _ = (layout.permute(x) for x in inputs(layout))
    budget = Budget(top_k=2)
    plan = PooledTopK()(q, k, layout, budget)
    plan.validate()
    assert (plan.q_blocks, plan.kv_blocks) == (layout.q_blocks, layout.blocks)
    tiles = plan.block_mask()[:, :, layout.q_tile_blocks, layout.tile_blocks]
    assert (tiles.sum(-1) == min(2, layout.num_tiles)).all()


def test_a_selector_may_choose_for_smaller_query_blocks() -> None:
    """A query block is a run of blocks, so that a plan over the blocks themselves fits the same sequence."""
    layout = LAYOUTS[2]
    q, k, v, _ = inputs(layout)

    def diagonal(q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        mask = torch.eye(layout.num_blocks, dtype=torch.bool, device=DEVICE)
        return BlockPlan.from_block_mask(mask[None, None], layout.blocks, layout.blocks)

    out = video_sparse_attention(q, k, v, layout, Budget(top_k=1), selector=diagonal)
    plain = TileLayout(layout.grid, layout.tile, layout.prefix, layout.suffix)
    torch.testing.assert_close(out, video_sparse_attention(q, k, v, plain, Budget(top_k=1), selector=diagonal))


def test_a_plan_over_tiles_coarsens_to_the_query_blocks() -> None:
    layout = LAYOUTS[0]
    mask = torch.rand(1, 2, layout.num_blocks, layout.num_blocks, device=DEVICE) < 0.3
    fine = BlockPlan.from_block_mask(mask, layout.blocks, layout.blocks)
    coarse = fine.coarsen(q=2)
    assert coarse.q_blocks == layout.q_blocks
    q, k, v = (torch.randn(1, layout.num_tokens, 2, 8, dtype=torch.float64, device=DEVICE) for _ in range(3))
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, coarse), block_sparse_attention(q, k, v, coarse.refine(layout.blocks))
    )


def test_the_module_chooses_them() -> None:
    module = VideoSparseAttention(32, 2, (2, 2, 2), Budget(top_k=2), q_tiles=(1, 1, 2)).to(DEVICE)
    layout = module.layout((4, 4, 8), prefix=3)
    assert layout == TileLayout((4, 4, 8), (2, 2, 2), prefix=3, q_tiles=(1, 1, 2))
    assert "tile=(2, 2, 2), q_tiles=(1, 1, 2), keeps top_k=2" in repr(module)
    x = torch.randn(1, layout.num_tokens, 32, device=DEVICE)
    mixed = module(x, (4, 4, 8), prefix=3)
    module.q_tiles = ()
    assert "q_tiles" not in repr(module)
    assert not torch.allclose(module(x, (4, 4, 8), prefix=3), mixed), "larger query blocks made no difference"
    module.tile, module.q_tiles = "fit", (2, 1, 1)
    fit = TileLayout.fit((4, 4, 8))
    assert module.layout((4, 4, 8)) == TileLayout((4, 4, 8), fit.tile, q_tiles=(2, 1, 1))
