"""The kernels that build lists give exactly those of the plain code."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import DEVICE
from openvsa import BlockPlan, Budget
from openvsa.plan import rank
from openvsa.plan.convert import mask_to_lists, transpose_lists
from plain import both

pytestmark = pytest.mark.triton

RANK = sys.modules["openvsa.plan.rank"]
SPECIAL = [0.0, -0.0, 1.0, 1.5, -2.0, 1e-30, -1e-30, 1e-45, 3e38, 3.4028234663852886e38, math.inf, -math.inf, math.nan]


@st.composite
def scores(draw: st.DrawFn, square: bool = False) -> Tensor:
    """With many ties, infinities and NaN; or, in half of the cases, without."""
    num_kv = draw(st.integers(1, 40))
    num_q = num_kv if square else draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        return torch.randn(1, 2, num_q, num_kv, generator=generator).to(DEVICE)
    values = torch.tensor(SPECIAL)
    return values[torch.randint(len(SPECIAL), (1, 2, num_q, num_kv), generator=generator)].to(DEVICE)


def alike(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert torch.equal(a, b)


@settings(max_examples=15)
@given(scores(), st.floats(0.01, 1.0), st.integers(0, 2))
def test_ranking(values: Tensor, ratio: float, first: int) -> None:
    budget = Budget(keep_ratio=ratio, min_blocks=max(first, 1), keep_first=min(first, values.shape[-1]))
    alike(*both(lambda: rank(values, budget)))


@settings(max_examples=8)
@given(scores(square=True), st.floats(0.01, 1.0))
def test_ranking_with_its_own_block(values: Tensor, ratio: float) -> None:
    values = values[:, :1]
    budget = Budget(keep_ratio=ratio, min_blocks=2, keep_self=True, keep_first=1)
    alike(*both(lambda: rank(values, budget)))


def test_ranking_with_forced_blocks() -> None:
    values = torch.randn(2, 1, 4, 9, device=DEVICE)
    values[0, 0, :, 2] = math.inf
    for shape in ((9,), (4, 9), (2, 1, 4, 9)):
        forced = torch.rand(shape, device=DEVICE) < 0.3
        alike(*both(lambda forced=forced: rank(values, Budget(top_k=9), forced)))
    forced = torch.zeros(9, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor([1, 8], device=DEVICE), True)
    ours, theirs = both(lambda: rank(values, Budget(top_k=3), forced))
    alike(ours, theirs)
    assert (ours[1] == 8).any(-1).all()


def test_ranking_in_low_precision_and_of_a_view() -> None:
    values = torch.randn(1, 2, 9, 3).to(DEVICE, torch.bfloat16).mT
    alike(*both(lambda: rank(values, Budget(top_k=2))))


@pytest.mark.parametrize("num_kv", [1, 2, 33, 1025, 16384])
def test_rows_of_every_length(num_kv: int) -> None:
    values = torch.randint(-50, 50, (1, 1, 2, num_kv)).float().to(DEVICE)
    alike(*both(lambda: rank(values, Budget(keep_ratio=0.3))))


@pytest.mark.parametrize("scale", [-3e38, -1.0, 0.0, 1e-40, 100.0])
def test_scores_of_any_size_and_sign(scale: float) -> None:
    """The threshold is first looked for within four octaves of the best score, which may be where none is."""
    values = (scale * (1 + torch.rand(1, 1, 4, 40))).to(DEVICE)
    for top_k in (1, 5, 40):
        alike(*both(lambda top_k=top_k: rank(values, Budget(top_k=top_k))))


@pytest.mark.parametrize("num_kv", [65, 140, 191])
def test_rows_in_two_pieces_and_at_any_distance(num_kv: int) -> None:
    values = torch.randint(-3, 3, (1, 2, 3, num_kv + 13)).float().to(DEVICE)[..., :num_kv]
    forced = torch.zeros(num_kv, dtype=torch.bool, device=DEVICE).index_fill(
        0, torch.tensor([num_kv - 1], device=DEVICE), True
    )
    for budget in (Budget(top_k=2), Budget(top_k=num_kv // 2, keep_first=1), Budget(top_k=num_kv - 1)):
        alike(*both(lambda budget=budget: rank(values, budget, forced)))


def test_rows_too_long_for_the_kernel_are_sorted() -> None:
    values = torch.randn(1, 1, 1, 16385).to(DEVICE)
    counts, indices = rank(values, Budget(top_k=4))
    assert torch.equal(indices[0, 0, 0].sort().values, values[0, 0, 0].topk(4).indices.sort().values.int())
    assert counts.item() == 4


@pytest.mark.parametrize("budget", [Budget(top_k=4, keep_self=True), Budget(top_p=0.5, keep_self=True)], ids=str)
def test_chunks_of_rows_give_the_ranking_of_all(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 3, 10, 10).to(DEVICE)
    whole = rank(values, budget)
    monkeypatch.setattr(RANK, "MAX_SCORES", 2 * 3 * 10 * 4)
    seen: list[tuple[int, int]] = []

    def some(start: int, stop: int) -> Tensor:
        seen.append((start, stop))
        return values[:, :, start:stop]

    alike(RANK.rank_in_chunks(some, 10, 10, 6, budget), whole)
    assert seen == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 40), (1, 3, 150, 5)], ids=str)
def test_transposing(share: float, shape: tuple[int, ...]) -> None:
    counts, indices = mask_to_lists(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share, None)
    past = torch.arange(indices.shape[-1]) >= counts[..., None]
    counts, indices = counts.to(DEVICE), indices.masked_fill(past, 2**30).to(DEVICE)  # never to be read
    (starts, readers), (other_starts, other_readers) = both(lambda: transpose_lists(counts, indices, shape[-1]))
    assert starts.dtype == readers.dtype == torch.int32
    assert readers.shape == other_readers.shape
    assert torch.equal(starts, other_starts)
    used = torch.arange(readers.shape[-1], device=DEVICE) < starts[..., -1:]
    assert torch.equal(readers[used], other_readers[used])


def test_transposing_a_plan_twice_gives_it_back() -> None:
    mask = torch.rand(1, 2, 7, 11).to(DEVICE) < 0.4
    plan = BlockPlan.from_block_mask(mask, list(range(8)), list(range(12)))
    assert torch.equal(plan.transpose().block_mask(), mask.mT)
    assert torch.equal(plan.transpose().transpose().block_mask(), mask)


def test_opcheck() -> None:
    values = torch.randn(1, 2, 3, 5, device=DEVICE)
    torch.library.opcheck(
        torch.ops.openvsa.top_blocks.default,
        (values, None, 2, 1, False, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    counts, indices = mask_to_lists(values > 0, 5)
    torch.library.opcheck(
        torch.ops.openvsa.transpose_lists.default, (counts, indices, 5), test_utils=("test_schema", "test_faketensor")
    )
