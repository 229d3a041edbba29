"""The attention of the released VSA weights against a plain statement of their contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openvsa import Budget, BudgetError, ShapeError, TileLayout
from openvsa.nn.released import released_attention
from openvsa.select import PooledTopK, ReleasedVSA
from vsa_contract import contract, slots_of

GRIDS = [(5, 7, 9), (4, 8, 8), (6, 6, 10), (9, 4, 5), (1, 1, 1)]


def tensors(
    grid: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, batch: int = 2, dim: int = 16
) -> list[Tensor]:
    """q, k, v and branch weight whose sums are exact in fp32 in any order: multiples of 1/8."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, math.prod(grid), 2, dim)
    return [((torch.randn(shape, generator=generator) * 16).round() / 8).to(dtype) for _ in range(4)]


def ours(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, grid: tuple[int, ...], method: ReleasedVSA) -> tuple:
    layout = TileLayout(grid, method.tile)
    out, plan = released_attention(*map(layout.permute, (q, k, v, weight)), layout, method, backend="cpu")
    return layout.unpermute(out), plan


@pytest.mark.parametrize("counted", ["tiles", "tokens"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bfloat16_is_the_contract(grid: tuple[int, int, int], sparsity: float, counted: str) -> None:
    q, k, v, weight = tensors(grid, torch.bfloat16)
    tiles = len(slots_of(grid)[0])
    whole = tiles if counted == "tiles" else math.prod(grid) / 64
    expected = contract(q, k, v, weight, grid, max(1, min(tiles, math.ceil((1 - sparsity) * whole))))
    out, plan = ours(q, k, v, weight, grid, ReleasedVSA(sparsity, counted))  # pyright: ignore[reportArgumentType]
    assert torch.equal(plan.block_mask(), expected.kept)
    # The sparse branch is exact attention, so its last bit may differ where it lies half-way between two values.
    terms = (expected.compressed * weight).abs() + (expected.out - expected.compressed * weight).abs()
    assert ((out - expected.out).abs() <= terms.float() * 2**-7).all()
    assert (out == expected.out).float().mean() > 0.98


def test_the_comparison_notices_a_missing_rounding() -> None:
    grid = (5, 7, 9)
    q, k, v, weight = tensors(grid, torch.bfloat16)
    expected = contract(q, k, v, weight, grid, 4)
    sparse = contract(q, k, v, torch.zeros_like(weight), grid, 4).out
    rounded_once = (expected.compressed.float() * weight.float() + sparse.float()).bfloat16()
    assert (rounded_once == expected.out).float().mean() < 0.95


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_float32_and_its_gradients_are_the_contract(grid: tuple[int, int, int]) -> None:
    tiles = len(slots_of(grid)[0])
    results = []
    for attend in ("contract", "ours"):
        inputs = [x.requires_grad_() for x in tensors(grid, torch.float32)]
        if attend == "contract":
            out = contract(*inputs, grid, math.ceil(0.5 * tiles)).out
        else:
            out, _ = ours(*inputs, grid, ReleasedVSA(0.5))
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        results.append([out.detach(), *(x.grad for x in inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rounded_scores_choose_other_tiles_than_exact_ones() -> None:
    grid = (8, 16, 16)
    q, k, v, weight = tensors(grid, torch.bfloat16, batch=1)
    k = k + 4  # the scores of a row are near each other, and rounding makes many of them alike
    expected = contract(q, k, v, weight, grid, 16).kept
    layout, method = TileLayout(grid, (4, 4, 4)), ReleasedVSA(0.5)
    exact = PooledTopK()(layout.permute(q), layout.permute(k), layout, Budget(top_k=16)).block_mask()
    assert torch.equal(ours(q, k, v, weight, grid, method)[1].block_mask(), expected)
    assert not torch.equal(exact, expected)


def test_ties_go_to_the_lowest_index() -> None:
    grid = (8, 8, 8)
    q, k, v, weight = tensors(grid, torch.bfloat16)
    _, plan = ours(q, torch.ones_like(k), v, weight, grid, ReleasedVSA(0.625))
    assert plan.block_mask()[..., :3].all()
    assert not plan.block_mask()[..., 3:].any()


def test_all_tiles_without_branch_weight_is_dense_attention() -> None:
    grid = (5, 7, 9)
    q, k, v, weight = tensors(grid, torch.float32)
    out, _ = ours(q, k, v, torch.zeros_like(weight), grid, ReleasedVSA(0.0))
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    with_branch, _ = ours(q, k, v, weight, grid, ReleasedVSA(0.0))
    compressed = contract(q, k, v, weight, grid, 12).compressed
    torch.testing.assert_close(with_branch, dense + weight * compressed, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    grid = (5, 7, 9)
    inputs = tensors(grid, torch.bfloat16)
    expected, _ = ours(*inputs, grid, ReleasedVSA(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = ours(*inputs, grid, ReleasedVSA(0.5))
    assert torch.equal(found, expected)


# Lattice, sparsity, tiles kept since FastVideo's change 1517 and before it: worked out by hand from its two formulas.
KEPT = [
    ((21, 30, 52), 0.8, 125, 103),
    ((21, 45, 80), 0.9, 144, 119),
    ((16, 28, 52), 0.9, 37, 37),
    ((20, 48, 80), 0.9, 120, 120),
    ((1, 1, 1), 0.99, 1, 1),
    # 0.3 of 10 tiles is 3, but 1 - 0.7 is a little more than 0.3 in floating point.
    ((4, 8, 20), 0.7, 4, 4),
]


@pytest.mark.parametrize(("grid", "sparsity", "tiles", "tokens"), KEPT, ids=str)
def test_number_of_tiles_kept(grid: tuple[int, int, int], sparsity: float, tiles: int, tokens: int) -> None:
    layout = TileLayout(grid, (4, 4, 4))
    assert ReleasedVSA(sparsity).kept(layout) == tiles
    assert ReleasedVSA(sparsity, "tokens").kept(layout) == tokens


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"in \[0, 1\), got 1"):
        ReleasedVSA(1)
    with pytest.raises(BudgetError, match="'tiles' or 'tokens', got 'cubes'"):
        ReleasedVSA(0.5, "cubes")  # pyright: ignore[reportArgumentType]
    method = ReleasedVSA(0.5)
    for layout in (TileLayout((8, 8, 8), (2, 4, 8)), TileLayout((8, 8), (4, 4)), TileLayout((512,), (64,))):
        with pytest.raises(ShapeError, match=r"lattice in tiles of \(4, 4, 4\)"):
            method.kept(layout)
    for layout in (TileLayout((8, 8, 8), (4, 4, 4), 5), TileLayout((8, 8, 8), (4, 4, 4), q_tiles=(1, 1, 2))):
        with pytest.raises(ShapeError, match="video tokens alone"):
            method.kept(layout)


def test_as_a_selector_it_makes_the_same_plan_under_its_own_budget_only() -> None:
    grid = (5, 7, 9)
    q, k, v, weight = tensors(grid, torch.bfloat16)
    layout, method = TileLayout(grid, (4, 4, 4)), ReleasedVSA(0.5)
    plan = method(layout.permute(q), layout.permute(k), layout, method.budget)
    assert torch.equal(plan.block_mask(), ours(q, k, v, weight, grid, method)[1].block_mask())
    with pytest.raises(BudgetError, match=r"decides how many tiles are kept; give .*keep_ratio=0.5.*top_k=3"):
        method(layout.permute(q), layout.permute(k), layout, Budget(top_k=3))


def test_wrong_tensors_are_refused() -> None:
    layout = TileLayout((4, 4, 4), (4, 4, 4))
    q, k, v, weight = tensors((4, 4, 4), torch.float32)
    with pytest.raises(ShapeError, match="k must be like q"):
        released_attention(q, k[:, :, :1], v, weight, layout, ReleasedVSA(0.5))
    with pytest.raises(ShapeError, match="branch_weight must be like q"):
        released_attention(q, k, v, weight.bfloat16(), layout, ReleasedVSA(0.5))
