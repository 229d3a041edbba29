"""The whole op inside a CUDA graph: captured once, replayed with other inputs, equal to eager bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from openvsa import BlockPlan, Budget, TileLayout, block_sparse_attention, video_sparse_attention
from openvsa.layout import shelf
from openvsa.nn import VideoSparseAttention

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUTS = [
    TileLayout((8, 8, 8), (4, 4, 4)),
    TileLayout((9, 10, 11), (4, 4, 4), prefix=70, suffix=5),
    TileLayout((8, 8, 12), (4, 4, 4), q_tiles=(1, 1, 2)),
]
BUDGETS = [Budget(keep_ratio=0.25), Budget(top_k=5, keep_first=1), Budget(top_p=0.6)]


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run`, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def replays_equal_eager(leaves: list[Tensor], run: Callable[[], list[Tensor]]) -> None:
    graph, results = capture(run)
    for seed in (1, 2):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn(x.shape, device=DEVICE, generator=generator))
        graph.replay()
        found = [x.clone() for x in results]
        for ours, eager in zip(found, run(), strict=True):
            assert torch.equal(ours, eager)


def make(tokens: int, heads: tuple[int, ...] = (4, 2, 2, 4)) -> list[Tensor]:
    return [torch.randn(2, tokens, h, 64, device=DEVICE).bfloat16().requires_grad_() for h in heads]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_forward(layout: TileLayout, budget: Budget, branch: bool) -> None:
    leaves = make(layout.num_tokens)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [video_sparse_attention(*leaves[:3], layout, budget, leaves[3] if branch else None)]

    replays_equal_eager(leaves, run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_forward_and_backward(layout: TileLayout, branch: bool) -> None:
    leaves = make(layout.num_tokens, (4, 2, 2, 4) if branch else (4, 2, 2))

    def run() -> list[Tensor]:
        out = video_sparse_attention(*leaves[:3], layout, BUDGETS[0], leaves[3] if branch else None)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    replays_equal_eager(leaves, run)


def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[1]
    monkeypatch.setattr(sys.modules["openvsa.plan.rank"], "MAX_SCORES", 2 * 4 * layout.num_tiles * 5)
    leaves = make(layout.num_tokens)

    def run() -> list[Tensor]:
        out = video_sparse_attention(*leaves[:3], layout, BUDGETS[1], leaves[3])
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    replays_equal_eager(leaves, run)


def test_the_op_and_its_plan() -> None:
    """The plan is made in the graph, from a mask that changes between replays."""
    blocks = LAYOUTS[0].blocks
    leaves = make(LAYOUTS[0].num_tokens, (4, 2, 2))
    scores = torch.randn(1, 4, blocks.num_blocks, blocks.num_blocks, device=DEVICE)

    def run() -> list[Tensor]:
        plan = BlockPlan.from_block_mask(scores > 0.3, blocks, blocks)
        out, lse = block_sparse_attention(*leaves, plan, return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad((out.float().sum(), lse.exp().sum()), leaves)]

    replays_equal_eager([*leaves, scores], run)


def test_the_module() -> None:
    attn = VideoSparseAttention(128, 2).to(DEVICE, torch.bfloat16)
    x = torch.randn(1, 9 * 10 * 11, 128, device=DEVICE).bfloat16()

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [attn(x, (9, 10, 11))]

    replays_equal_eager([x], run)


def test_the_module_whose_first_forward_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is made while it is traced, with index tensors on the device: one on the CPU would rule out graphs."""
    monkeypatch.setattr(shelf, "_NAMES", {})
    torch.compiler.reset()
    counters.clear()
    # At density 1 there is no choice that rounding could change.
    attn = VideoSparseAttention(128, 2, budget=Budget(keep_ratio=1.0)).to(DEVICE)
    compiled = torch.compile(attn, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 5 * 9 * 7, 128, device=DEVICE)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x, (5, 9, 7)).clone(), attn(x, (5, 9, 7)), rtol=1e-2, atol=1e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()
