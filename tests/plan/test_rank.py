"""Ranking scores under a budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DEVICE
from openvsa import BlockPlan, Budget, BudgetError, ShapeError
from openvsa.plan import rank


@st.composite
def scores(draw: st.DrawFn, square: bool = False) -> Tensor:
    """With many ties, infinities and NaN among them."""
    num_q, num_kv = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    values = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e-30, -1e-30, 3e38, math.inf, -math.inf, math.nan])
    rows = num_kv if square else num_q
    flat = draw(st.lists(values, min_size=2 * rows * num_kv, max_size=2 * rows * num_kv))
    return torch.tensor(flat).reshape(1, 2, rows, num_kv).to(DEVICE)


def best_first(row: list[float]) -> list[int]:
    """Columns by falling score, ties by rising index, NaN last."""
    return sorted(range(len(row)), key=lambda j: (math.isnan(row[j]), 0 if math.isnan(row[j]) else -row[j], j))


def lists(chosen: tuple[Tensor, Tensor]) -> list[list[int]]:
    counts, indices = chosen
    return [
        row[:count]
        for row, count in zip(indices.flatten(0, -2).tolist(), counts.flatten().tolist(), strict=True)
    ]  # fmt: skip


@given(scores(), st.integers(1, 10))
def test_top_k_keeps_the_best(values: Tensor, top_k: int) -> None:
    chosen = rank(values, Budget(top_k=top_k))
    kept = min(top_k, values.shape[-1])
    assert chosen[0].dtype == chosen[1].dtype == torch.int32
    assert chosen[1].shape == (*values.shape[:-1], kept)
    for picked, row in zip(lists(chosen), values.flatten(0, -2).tolist(), strict=True):
        assert picked == sorted(best_first(row)[:kept])


@given(scores(), st.floats(0.01, 1.0))
def test_keep_ratio_keeps_its_share(values: Tensor, ratio: float) -> None:
    num_kv = values.shape[-1]
    counts, _ = rank(values, Budget(keep_ratio=ratio))
    assert (counts == max(1, math.ceil(ratio * num_kv - 1e-9))).all()


@pytest.mark.parametrize(
    ("ratio", "blocks", "kept"),
    [(0.1, 30, 3), (0.125, 624, 78), (1 / 3, 9, 3), (1e-9, 5, 1), (1.0, 7, 7), (0.11, 100, 11)],
)
def test_keep_ratio_is_not_off_by_one(ratio: float, blocks: int, kept: int) -> None:
    assert Budget(keep_ratio=ratio).blocks(blocks) == kept


def test_ties_go_to_the_lowest_index() -> None:
    assert lists(rank(torch.zeros(1, 1, 1, 100, device=DEVICE), Budget(top_k=5))) == [[0, 1, 2, 3, 4]]
    wave = torch.tensor([0.0, -0.0, 1.0, 1.0, 0.0]).to(DEVICE)[None]
    assert lists(rank(wave, Budget(top_k=3))) == [[0, 2, 3]]


def test_nan_ranks_below_everything() -> None:
    row = torch.tensor([[math.nan, -math.inf, -1.0, math.nan]], device=DEVICE)
    assert lists(rank(row, Budget(top_k=2))) == [[1, 2]]


@given(scores(), st.data())
def test_forced_blocks_are_kept(values: Tensor, data: st.DataObject) -> None:
    num_kv = values.shape[-1]
    top_k = data.draw(st.integers(1, num_kv))
    forced_columns = data.draw(st.sets(st.integers(0, num_kv - 1), max_size=top_k))
    forced = torch.zeros(num_kv, dtype=torch.bool)
    forced[list(forced_columns)] = True
    for picked, row in zip(
        lists(rank(values, Budget(top_k=top_k), forced.to(DEVICE))), values.flatten(0, -2).tolist(), strict=True
    ):
        free = [j for j in best_first(row) if j not in forced_columns]
        assert picked == sorted([*forced_columns, *free[: top_k - len(forced_columns)]])


@given(scores(square=True), st.data())
def test_self_and_first_blocks_are_kept(values: Tensor, data: st.DataObject) -> None:
    num_kv = values.shape[-1]
    first = data.draw(st.integers(0, num_kv - 1))
    budget = Budget(top_k=data.draw(st.integers(min(first + 1, num_kv), num_kv)), keep_self=True, keep_first=first)
    for row, picked in enumerate(lists(rank(values, budget))):
        assert {*range(first), row % num_kv} <= set(picked)
        assert len(picked) == budget.top_k


def random_scores(seed: int) -> Tensor:
    return 3 * torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@given(st.integers(0, 1000), st.floats(0.05, 0.999))
def test_top_p_is_sufficient_and_minimal(seed: int, top_p: float) -> None:
    values = random_scores(seed)
    mass = values.double().softmax(-1).flatten(0, -2).tolist()
    for picked, row in zip(lists(rank(values, Budget(top_p=top_p))), mass, strict=True):
        kept = sorted((row[j] for j in picked), reverse=True)
        assert picked == sorted(best_first(row)[: len(picked)])
        assert sum(kept) >= top_p - 2e-6
        assert len(kept) == 1 or sum(kept[:-1]) < top_p


@given(st.integers(0, 1000), st.floats(0.05, 0.9), st.integers(1, 6), st.integers(6, 12))
def test_top_p_obeys_its_bounds(seed: int, top_p: float, low: int, high: int) -> None:
    values = random_scores(seed)
    free = rank(values, Budget(top_p=top_p))[0]
    counts, indices = rank(values, Budget(top_p=top_p, min_blocks=low, max_blocks=high))
    assert torch.equal(counts, free.clamp(low, high))
    assert indices.shape[-1] == high


def test_top_p_one_keeps_everything() -> None:
    steep = torch.tensor([[0.0, -50.0, -90.0, -200.0]], device=DEVICE)
    assert lists(rank(steep, Budget(top_p=1.0))) == [[0, 1, 2, 3]]


def test_top_p_keeps_forced_blocks() -> None:
    steep = torch.tensor([[9.0, 0.0, 0.0, 0.0]], device=DEVICE)
    forced = torch.tensor([False, False, True, True], device=DEVICE)
    assert {2, 3} <= set(lists(rank(steep, Budget(top_p=0.1), forced))[0])


def test_entries_past_the_count_are_zero() -> None:
    counts, indices = rank(random_scores(0), Budget(top_p=0.5))
    past = torch.arange(indices.shape[-1], device=DEVICE) >= counts[..., None]
    assert past.any()
    assert (indices[past] == 0).all()


def test_same_scores_same_plan_and_no_gradient() -> None:
    values = random_scores(1).requires_grad_()
    first, second = rank(values, Budget(top_k=3)), rank(values.clone(), Budget(top_k=3))
    assert torch.equal(first[1], second[1])
    assert not first[1].requires_grad


def test_low_precision_scores_are_compared_in_fp32() -> None:
    values = random_scores(2).bfloat16()
    assert torch.equal(rank(values, Budget(top_k=3))[1], rank(values.float(), Budget(top_k=3))[1])


@given(scores(), st.integers(1, 4))
def test_from_scores_is_rank(values: Tensor, top_k: int) -> None:
    plan = BlockPlan.from_scores(
        values, Budget(top_k=top_k), list(range(values.shape[-2] + 1)), list(range(values.shape[-1] + 1))
    )
    assert torch.equal(plan.kv_indices, rank(values, Budget(top_k=top_k))[1])
    plan.validate()


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"scores must be \[\.\.\., NQ, NK\], got shape \(3,\)"):
        rank(torch.zeros(3), Budget(top_k=1))
    with pytest.raises(BudgetError, match="keep_self needs as many query blocks as key blocks, got 2 and 3"):
        rank(torch.zeros(2, 3), Budget(top_k=1, keep_self=True))
    with pytest.raises(BudgetError, match=r"3 blocks must always be kept .* but the budget is 2 of 5"):
        rank(torch.zeros(5, 5), Budget(top_k=2, keep_first=2, keep_self=True))
    with pytest.raises(BudgetError, match=r"budget must be a Budget such as Budget\(keep_ratio=0.125\), got 0.5"):
        rank(torch.zeros(2, 3), 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "forced", [torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 3, dtype=torch.bool), torch.ones(2, 3, 4) > 0]
)
def test_forced_blocks_must_fit(forced: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"forced must be bool and broadcastable to the scores \(3, 4\), got"):
        rank(torch.zeros(3, 4), Budget(top_k=2), forced)
