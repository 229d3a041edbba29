"""Merging attention over disjoint key sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DEVICE, offsets
from openvsa import BlockPlan, ShapeError, block_sparse_attention, merge

LENS = (3, 5, 2, 4)
Pair = tuple[Tensor, Tensor]


def qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 14, 2, 4, dtype=dtype, device=DEVICE) for _ in range(3))


@st.composite
def splits(draw: st.DrawFn) -> Tensor:
    """Which part each block of a 4 x 4 plan belongs to; 0 is none, so some rows are empty in some or all parts."""
    owner = draw(st.lists(st.integers(0, 3), min_size=16, max_size=16))
    return torch.tensor(owner).reshape(1, 1, 4, 4).to(DEVICE)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Pair:
    plan = BlockPlan.from_block_mask(mask, offsets(LENS), offsets(LENS))
    return block_sparse_attention(q, k, v, plan, backend="reference", return_lse=True)


def close(a: Pair, b: Pair) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@given(splits())
def test_merged_parts_are_attention_over_their_union(owner: Tensor) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    merged = merge([attend(q, k, v, owner == part) for part in (1, 2, 3)])
    whole = attend(q, k, v, owner > 0)
    close(merged, whole)
    read = whole[1].isfinite()
    weights = [torch.randn_like(x) for x in whole]
    grads = [
        torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1])[read].sum(), (q, k, v))
        for out, lse in (merged, whole)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(splits())
def test_merging_is_associative_and_commutative(owner: Tensor) -> None:
    q, k, v = qkv()
    a, b, c = (attend(q, k, v, owner == part) for part in (1, 2, 3))
    close(merge([merge([a, b]), c]), merge([a, merge([b, c])]))
    close(merge([a, b, c]), merge([merge([a, b]), c]))
    close(merge([a, b]), merge([b, a]))
    close(merge([a]), a)


def test_gradients_numerically() -> None:
    outs = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(list(zip(x[:3], x[3:], strict=True))), (*outs, *lses))


def test_large_scores_do_not_overflow() -> None:
    out = torch.randn(1, 3, 2, 2, dtype=torch.float32)
    lse = torch.tensor([3e4, -3e4, 0.0]).expand(1, 2, 3)
    merged, total = merge([(out, lse), (-out, lse)])
    assert (merged.abs() < 1e-6).all()
    torch.testing.assert_close(total, lse + torch.tensor(2.0).log())


def test_dtypes() -> None:
    out, lse = torch.randn(1, 3, 2, 2).bfloat16(), torch.randn(1, 2, 3)
    merged, total = merge([(out, lse), (out, lse + 1)])
    assert (merged.dtype, total.dtype) == (torch.bfloat16, torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ShapeError, match="at least one"):
        merge([])
    with pytest.raises(ShapeError, match=r"got \(1, 3, 2, 5\) and \(1, 2, 3\) beside \(1, 3, 2, 4\)"):
        merge([(out, lse), (torch.zeros(1, 3, 2, 5), lse)])
    with pytest.raises(ShapeError, match=r"got \(1, 3, 2, 4\) and \(1, 3, 2\)"):
        merge([(out, lse), (out, lse.transpose(1, 2))])
    with pytest.raises(ShapeError, match=r"got \(3, 2, 4\)"):
        merge([(out[0], lse)])
    with pytest.raises(ShapeError, match=r"floating outs and lses on one device, got torch\.float32 on meta"):
        merge([(out, lse), (out.to("meta"), lse)])
    with pytest.raises(ShapeError, match=r"floating outs and lses on one device, got torch\.int32"):
        merge([(out.int(), lse)])
