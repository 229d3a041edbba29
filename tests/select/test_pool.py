"""Block means, exact for ragged blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DEVICE, offsets
from openvsa import ShapeError
from openvsa.layout import BlockOffsets, TileLayout
from openvsa.select import pool_mean
from openvsa.select.pool import spread

lens_lists = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([[4, 4, 4], [4, 4, 2], [3]])
)


def means(x: Tensor, lens: list[int]) -> Tensor:
    starts = offsets(lens)
    return torch.stack([x[:, a : a + n].mean(1) for a, n in zip(starts, lens, strict=False)], dim=1)


@given(lens_lists, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_it_is_the_mean_of_each_block(lens: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(2, sum(lens), 3, 4, dtype=torch.float64).to(DEVICE, dtype)
    pooled = pool_mean(x, BlockOffsets(lens))
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), means(x.double(), lens), rtol=1e-6, atol=1e-6)


@given(lens_lists)
def test_gradients(lens: list[int]) -> None:
    x = torch.randn(1, sum(lens), 1, 2, dtype=torch.float64, requires_grad=True)
    blocks = BlockOffsets(lens)
    assert torch.autograd.gradcheck(lambda x: pool_mean(x, blocks), x)
    rows = torch.randn(1, len(lens), 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread(x, blocks), rows)
    assert torch.autograd.gradgradcheck(lambda x: spread(x, blocks) ** 2, rows)


@given(lens_lists)
def test_spread_repeats_each_row_for_its_tokens(lens: list[int]) -> None:
    rows = torch.randn(2, len(lens), 3, 4, device=DEVICE)
    tokens = spread(rows, BlockOffsets(lens))
    assert torch.equal(tokens, rows.repeat_interleave(torch.tensor(lens, device=DEVICE), dim=1))
    torch.testing.assert_close(pool_mean(tokens, BlockOffsets(lens)), rows)


def test_bf16_is_not_summed_in_bf16() -> None:
    """256 ones and one more: a bf16 accumulator would stop at 256."""
    x = torch.ones(1, 257, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    assert pool_mean(x, BlockOffsets([257])).item() == 1.0


def test_nan_stays_in_its_block() -> None:
    x = torch.zeros(1, 6, 1, 1, device=DEVICE)
    x[:, 2] = float("nan")
    assert pool_mean(x, BlockOffsets([2, 3, 1])).flatten().isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1, 6, 1), (1, 5, 1, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"x must be \[B, 6, H, D\] for BlockOffsets.*got shape \(1, "):
        pool_mean(torch.zeros(shape), BlockOffsets([2, 4]))
    with pytest.raises(ShapeError, match=r"x must be \[B, 2, H, D\] for BlockOffsets.*got shape \(1, "):
        spread(torch.zeros(shape), BlockOffsets([2, 4]))


def test_a_layout_is_not_its_blocks() -> None:
    layout = TileLayout((2, 3), (2, 2))
    for pool in (pool_mean, spread):
        with pytest.raises(ShapeError, match=r"such as layout\.blocks; got Tensor and TileLayout"):
            pool(torch.zeros(1, 6, 1, 1), layout)
        with pytest.raises(ShapeError, match="got list and BlockOffsets"):
            pool([0.0] * 6, layout.blocks)
