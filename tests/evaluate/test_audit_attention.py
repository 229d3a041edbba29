"""The audit of one attention call against plain formulas."""

from __future__ import annotations

import pytest
import torch

from openvsa import Budget, TileLayout, block_sparse_attention
from openvsa.evaluate import audit_attention
from openvsa.evaluate.audit_attention import audit_call, exact_attention, oracle_plan
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK

LAYOUTS = [TileLayout(grid=(3, 5, 7), tile=(2, 2, 4)), TileLayout(grid=(4, 6), tile=(2, 3), prefix=3, suffix=4)]


def case(layout: TileLayout, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = 2 * torch.randn(2, layout.num_tokens, 4, 8)
    k, v = 2 * torch.randn(2, 2, layout.num_tokens, kv_heads, 8)
    return q, k, v


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [H, S, S] and output [S, H, D] of the first sample."""
    group = q.shape[2] // k.shape[2]
    k, v = (x[0].double().repeat_interleave(group, 1) for x in (k, v))
    p = (torch.einsum("shd,thd->hst", q[0].double(), k) / q.shape[-1] ** 0.5).softmax(-1)
    return p, torch.einsum("hst,thd->shd", p, v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_scores", [1 << 24, 1, 300])
def test_exact_mass_and_output(layout: TileLayout, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_attention, "MAX_SCORES", max_scores)
    q, k, v = case(layout)
    mass, out = exact_attention(q[:1], k[:1], v[:1], layout.blocks, layout.blocks)
    p, expected = naive(q, k, v)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    parts = p.split(list(layout.blocks.lens), 1)
    means = torch.stack(
        [torch.stack([c.sum(-1) for c in part.split(list(layout.blocks.lens), 2)], -1).mean(1) for part in parts], 1
    )
    torch.testing.assert_close(mass.double(), means, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_a_call(layout: TileLayout) -> None:
    q, k, v = case(layout)
    budget = Budget(keep_ratio=0.4)
    found = audit_call(q, k, v, layout, PooledTopK(), budget, densities=(1.0, 0.4))
    plan = PooledTopK()(q[:1], k[:1], layout, budget)
    p, dense = naive(q, k, v)
    tokens = plan.block_mask()[0].repeat_interleave(layout.blocks.lens_on(q.device), 1)
    tokens = tokens.repeat_interleave(layout.blocks.lens_on(q.device), 2)
    sparse = block_sparse_attention(q[:1].double(), k[:1].double(), v[:1].double(), plan)[0]
    assert found.recall == pytest.approx((p * tokens).sum(-1).mean(-1).tolist(), abs=1e-5)
    assert found.output == pytest.approx(dense.square().sum((0, 2)).tolist(), rel=1e-4)
    assert found.error == pytest.approx((sparse - dense).square().sum((0, 2)).tolist(), rel=1e-3)
    assert found.density == pytest.approx([plan.density] * 4, abs=1e-6)
    assert all(best >= ours - 1e-6 for best, ours in zip(found.oracle_recall, found.recall, strict=True))
    assert sum(found.oracle_recall) > sum(found.recall)
    assert [point.asked for point in found.curve] == [0.4, 1.0]
    assert found.curve[0].error == pytest.approx(found.error)
    assert found.curve[1].density == (1.0,) * 4
    assert max(found.curve[1].error) < 1e-6 * min(found.output)


def test_some_rows_stand_for_all() -> None:
    layout = TileLayout(grid=(4, 6, 8), tile=(2, 2, 2))
    q, k, v = case(layout)
    part = audit_call(q, k, v, layout, PooledTopK(), Budget(keep_ratio=0.25), max_rows=5)
    plan = PooledTopK()(q[:1], k[:1], layout, Budget(keep_ratio=0.25))
    mass, _ = exact_attention(q[:1], k[:1], v[:1], layout.blocks, layout.blocks)
    rows = [0, 4, 9, 14, 19]
    expected = (mass * plan.block_mask()[0]).sum(-1)[:, rows].mean(-1)
    assert part.recall == pytest.approx(expected.tolist(), abs=1e-5)
    sparse = block_sparse_attention(q[:1], k[:1], v[:1], plan)
    dense = naive(q, k, v)[1].float()
    error = (sparse[0] - dense).square().sum(-1).unflatten(0, (-1, 8))[rows].sum((0, 1))
    assert part.error == pytest.approx(error.tolist(), rel=1e-3)


def test_the_oracle_keeps_as_many_tiles_and_the_most_mass() -> None:
    layout = LAYOUTS[1]
    q, k, v = case(layout)
    plan = PooledTopK()(q[:1], k[:1], layout, Budget(top_p=0.6))
    mass, _ = exact_attention(q[:1], k[:1], v[:1], layout.blocks, layout.blocks)
    oracle = oracle_plan(mass, plan, layout)
    assert torch.equal(oracle.kv_num_blocks, plan.kv_num_blocks)
    text = torch.ones(layout.num_blocks, dtype=torch.bool)
    text[layout.tile_blocks] = False
    assert torch.equal(oracle.block_mask()[..., text], plan.block_mask()[..., text]), "the text makes room for no tile"
    mask, mass = oracle.block_mask()[0][..., ~text], mass[..., ~text]
    least = torch.where(mask, mass, torch.inf).amin(-1)
    most = torch.where(mask, -torch.inf, mass).amax(-1)
    assert (least >= most).all()


def test_the_oracle_leaves_text_as_the_plan_has_it() -> None:
    """Here in a plan that reads no text, though text has the most mass."""
    layout = LAYOUTS[1]
    q, k, v = case(layout)
    k[:, : layout.prefix] = q.mean((1, 2), keepdim=True)
    tiles = torch.zeros(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
    tiles[:, layout.tile_blocks.start] = True
    plan = BlockPlan.from_block_mask(tiles[None, None], layout.blocks, layout.blocks)
    mass, _ = exact_attention(q[:1], k[:1], v[:1], layout.blocks, layout.blocks)
    mask = oracle_plan(mass, plan, layout).block_mask()[0]
    assert (mask.sum(-1) == 1).all()
    assert torch.equal(mask.int().argmax(-1), mass[..., layout.tile_blocks].argmax(-1) + layout.tile_blocks.start)
