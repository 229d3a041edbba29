"""What a GPU must give: the plan of the CPU, the same bits twice, one graph, and no dense attention by surprise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import equal_lens, offsets, random_mask
from openvsa import BlockPlan, Budget, TileLayout, block_sparse_attention, video_sparse_attention
from openvsa.plan import rank
from openvsa.select import PooledTopK

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUT = TileLayout((9, 10, 11), (4, 4, 4), prefix=30)


def leaves(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, LAYOUT.num_tokens, 4, 64, device=DEVICE).to(dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("budget", [Budget(top_k=5), Budget(keep_ratio=0.3), Budget(top_p=0.5)], ids=str)
def test_ranking_is_that_of_the_cpu(budget: Budget) -> None:
    scores = torch.randint(-3, 3, (2, 4, 30, 30)).float()
    here, there = rank(scores, budget), rank(scores.to(DEVICE), budget)
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(here[1], there[1].cpu())


def test_plans_are_those_of_the_cpu() -> None:
    mask = random_mask((2, 4, 12, 12), 0.3, torch.Generator().manual_seed(0))
    mask[0, 0, 3] = False
    blocks = list(range(13))
    here, there = (BlockPlan.from_block_mask(m, blocks, blocks) for m in (mask, mask.to(DEVICE)))
    there.validate()
    there.transpose().validate()
    for a, b in (
        (here.block_mask(), there.block_mask()),
        (here.transpose().block_mask(), there.transpose().block_mask()),
        (here.transpose_csr()[0], there.transpose_csr()[0]),
    ):
        assert torch.equal(a, b.cpu())
    assert (here.density, here.cost) == (there.density, there.cost)
    assert torch.equal(there.to("cpu").block_mask(), mask)


def test_vsa_gives_the_same_bits_twice() -> None:
    inputs = leaves()
    results = []
    for _ in range(2):
        out = video_sparse_attention(*inputs[:3], LAYOUT, Budget(keep_ratio=0.3), inputs[3])
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_vsa_compiles_in_one_graph() -> None:
    inputs = leaves(torch.float32)
    selector = PooledTopK()

    def f(*x: Tensor) -> Tensor:
        return video_sparse_attention(*x[:3], LAYOUT, Budget(keep_ratio=1.0), x[3], selector=selector)

    eager, compiled = f(*inputs), torch.compile(f, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (eager, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_more_heads_than_a_grid_has_rows() -> None:
    """The second and third dimensions of a grid end at 65,535; batch times heads may not."""
    layout = TileLayout((6,), (3,))
    q, k, v = (torch.randn(8192, 6, 9, 32, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))
    out = video_sparse_attention(q, k, v, layout, Budget(top_k=1), backend="triton")
    last = [x[-2:].detach().requires_grad_() for x in (q, k, v)]
    of_last = video_sparse_attention(*last, layout, Budget(top_k=1), backend="triton")
    assert torch.equal(out[-2:], of_last)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for a, b in zip(grads, torch.autograd.grad(of_last.float().square().sum(), last), strict=True):
        assert torch.equal(a[-2:], b)


def test_more_sequences_than_a_grid_has_rows() -> None:
    layout = TileLayout((5, 3), (2, 2))
    x = torch.randn(65_600, 15, 2, 8, device=DEVICE)
    moved = layout.permute(x)
    assert torch.equal(moved, x[:, layout.permutation.to(DEVICE)])
    assert torch.equal(layout.unpermute(moved), x)


def test_flex_stays_sparse_beyond_the_compile_limit_of_dynamo() -> None:
    """Dense scores at this length would take 8 GiB."""
    lens = equal_lens(32768, 128)
    plan = BlockPlan.from_block_mask(
        torch.eye(256, dtype=torch.bool, device=DEVICE)[None, None], offsets(lens), offsets(lens)
    )
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shapes = [(dtype, dim) for dtype in dtypes for dim in (32, 64, 128)]
    assert len(shapes) > 8
    torch.cuda.reset_peak_memory_stats()
    for dtype, dim in shapes:
        q = torch.randn(1, 32768, 2, dim, device=DEVICE).to(dtype)
        block_sparse_attention(q, q, q, plan, backend="flex")
    assert torch.cuda.max_memory_allocated() < 2**30
