"""Nothing between the tokens and the result waits for the GPU: plans, selection, the op, and its gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from helpers import Case, make_inputs, random_lens, random_mask
from openvsa import BlockPlan, Budget, TileLayout, block_sparse_attention, merge, video_sparse_attention
from openvsa.layout import BlockOffsets
from openvsa.nn import VideoSparseAttention
from openvsa.plan import rank
from openvsa.select import PooledTopK

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BUDGETS = [
    Budget(top_k=3),
    Budget(keep_ratio=0.25, keep_self=True, keep_first=1),
    Budget(top_p=0.6, min_blocks=2, max_blocks=5),
]


@contextmanager
def no_sync() -> Iterator[None]:
    """An error at any operation of torch that waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        torch.ones(1, device=DEVICE).item()
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.fixture
def blocks() -> BlockOffsets:
    """New ones for each test, so that the first copy to the device is made under watch too."""
    return BlockOffsets(random_lens(12, 1, 32, seed=0))


@pytest.fixture
def mask() -> Tensor:
    return random_mask((2, 3, 12, 12), 0.3, torch.Generator().manual_seed(0)).to(DEVICE)


def test_layouts() -> None:
    layout = TileLayout((5, 7, 9), (4, 4, 4), prefix=5, suffix=2)
    x = torch.randn(2, layout.num_tokens, 3, device=DEVICE, requires_grad=True)
    with no_sync():
        layout.unpermute(layout.permute(x) * 2).sum().backward()


def test_making_and_changing_plans(blocks: BlockOffsets, mask: Tensor) -> None:
    with no_sync():
        plan = BlockPlan.from_block_mask(mask, blocks, blocks)
        bounded = BlockPlan.from_block_mask(mask, blocks, blocks, max_blocks=12)
        made = [
            plan,
            bounded,
            BlockPlan.dense(blocks, blocks, DEVICE),
            BlockPlan.from_csr(*plan.to_csr(), blocks, blocks),
            plan.transpose(),
            plan | bounded.transpose(),
            plan & bounded.transpose(),
            plan.with_dense_blocks(rows=[0, 3], columns=[11]),
        ]
        for one in made:
            one.transpose_csr()
            one.block_mask()
            assert one.q_offsets.device.type == one.kv_offsets.device.type == "cuda"
    assert all(one.density > 0 for one in made)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_ranking(blocks: BlockOffsets, budget: Budget) -> None:
    scores = torch.randn(2, 3, 12, 12, device=DEVICE)
    forced = torch.zeros(12, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor([5], device=DEVICE), True)
    with no_sync():
        rank(scores, budget, forced if budget.top_k else None)
        BlockPlan.from_scores(scores, budget, blocks, blocks)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("text", [0, 70])
def test_selection(budget: Budget, text: int) -> None:
    layout = TileLayout((9, 10, 11), (4, 4, 4), prefix=text)
    q, k = (torch.randn(2, layout.num_tokens, heads, 16, device=DEVICE) for heads in (4, 2))
    with no_sync():
        PooledTopK(length_bias=True)(q, k, layout, budget)


def test_the_op_and_merge() -> None:
    lens = random_lens(8, 1, 64, seed=3)
    case = Case("no-sync", lens, lens, batch=2, heads=4, kv_heads=1, plan_heads=4, empty_row=True)
    inputs = make_inputs(case, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in inputs[:3])

    def run() -> None:
        part = block_sparse_attention(q, k, v, inputs.plan, backend="triton", return_lse=True)
        out, lse = merge([part, part])
        torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))

    run()  # compiles the kernels
    with no_sync():
        run()


@pytest.mark.parametrize("text", [0, 70])
def test_video_sparse_attention(text: int) -> None:
    def run(grid: tuple[int, int, int]) -> None:
        layout = TileLayout(grid, (4, 4, 4), suffix=text)
        leaves = [torch.randn(1, layout.num_tokens, 2, 64, device=DEVICE, requires_grad=True) for _ in range(4)]
        out = video_sparse_attention(*leaves[:3], layout, Budget(keep_ratio=0.25), leaves[3])
        torch.autograd.grad(out.sum(), leaves)

    run((9, 10, 11))
    with no_sync():
        run((5, 6, 7))


def test_query_blocks_of_several_tiles_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["openvsa.plan.rank"], "MAX_SCORES", 2 * 12 * 4)

    def run(grid: tuple[int, int, int]) -> None:
        layout = TileLayout(grid, (4, 4, 4), suffix=9, q_tiles=(1, 1, 2))
        leaves = [torch.randn(1, layout.num_tokens, 2, 64, device=DEVICE, requires_grad=True) for _ in range(4)]
        out = video_sparse_attention(*leaves[:3], layout, Budget(keep_ratio=0.25, keep_first=1), leaves[3])
        torch.autograd.grad(out.sum(), leaves)

    run((9, 10, 11))
    with no_sync():
        run((5, 6, 7))


def test_the_module() -> None:
    attn = VideoSparseAttention(64, 4).to(DEVICE)
    x = torch.randn(1, 9 * 10 * 11, 64, device=DEVICE)
    attn(x, (9, 10, 11)).sum().backward()
    with no_sync():
        attn(x, (11, 9, 10)).sum().backward()
