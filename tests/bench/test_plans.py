"""Plans to measure with: as dense as asked, and with neighbours that agree as those of the recorded model do."""

from __future__ import annotations

import pytest
import torch

from openvsa import BlockPlan, TileLayout
from openvsa.bench.plans import PATTERNS, make_plan, recorded_overlap, shared_with_next, smooth_queries_and_keys

LATTICE = TileLayout((9, 14, 18), (4, 4, 4))
CPU = torch.device("cpu")


def plan_of(pattern: str, layout: TileLayout, density: float) -> BlockPlan:
    q, k = smooth_queries_and_keys(layout, 2, 4, 2, 16, CPU)
    return make_plan(pattern, layout.permute(q), layout.permute(k), layout, density)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("q_tiles", [(), (2, 1, 1)])
def test_every_tile_keeps_its_share(pattern: str, q_tiles: tuple[int, ...]) -> None:
    layout = TileLayout(LATTICE.grid, LATTICE.tile, q_tiles=q_tiles)
    plan = plan_of(pattern, layout, 0.2)
    kept = -(-layout.num_tiles // 5)
    assert plan.kv_num_blocks.shape == (2, 4, layout.q_blocks.num_blocks)
    assert (plan.kv_num_blocks == kept).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_reads_all_and_is_read_by_all(pattern: str) -> None:
    layout = TileLayout((5, 7, 9), (4, 4, 4), prefix=70)
    mask = plan_of(pattern, layout, 0.25).block_mask()
    assert mask[:, :, :2].all()
    assert mask[..., :2].all()
    assert (mask[:, :, 2:, 2:].sum(-1) == -(-layout.num_tiles // 4)).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_plan_every_time(pattern: str) -> None:
    plans = [plan_of(pattern, LATTICE, 0.2).block_mask() for _ in range(2)]
    assert torch.equal(*plans)


def test_shared_with_next_counts_common_blocks() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)[None, None]
    plan = BlockPlan.from_block_mask(mask, [0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert shared_with_next(plan).tolist() == [[(1 / 2 + 2 / 2) / 2]]


def test_model_plans_share_what_was_recorded() -> None:
    """Heads are spread over the recorded ones, from those that share least to those that share most."""
    layout = TileLayout((16, 32, 32), (4, 4, 4))
    q, k = smooth_queries_and_keys(layout, 1, 4, 4, 32, CPU)
    recorded, density = recorded_overlap()
    plan = make_plan("model", layout.permute(q), layout.permute(k), layout, density)
    found = shared_with_next(plan)[0].tolist()
    wanted = [recorded[round(h * (len(recorded) - 1) / 3)] for h in range(4)]
    assert found == pytest.approx(wanted, abs=0.08)
    random = shared_with_next(make_plan("random", q, k, layout, density))
    assert float(random.max()) < 0.2


def test_fields_have_variance_one_and_text_is_noise() -> None:
    layout = TileLayout((8, 8, 8), (4, 4, 4), prefix=64, suffix=32)
    q, k = smooth_queries_and_keys(layout, 2, 4, 2, 32, CPU)
    assert q.shape == (2, 608, 4, 32)
    assert k.shape == (2, 608, 2, 32)
    assert float(q.std()) == pytest.approx(1, abs=0.1)
    assert float((q[:, :64] * q[:, 1:65]).mean()) == pytest.approx(0, abs=0.05)
