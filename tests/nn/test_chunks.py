"""Long sequences, whose scores between blocks never exist all at a time."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import DEVICE
from openvsa import Budget, TileLayout, video_sparse_attention
from openvsa.nn import compressed_attention
from openvsa.select import PooledTopK

LAYOUT = TileLayout((3, 5, 6), (2, 2, 4), prefix=3)  # 12 tiles
SCORES_OF_A_ROW = 2 * 4 * 12


@pytest.fixture(params=[1, 5, 11])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys.modules["openvsa.plan.rank"], "MAX_SCORES", request.param * SCORES_OF_A_ROW)
    return request.param


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, LAYOUT.num_tokens, h, 8, generator=generator).to(DEVICE, dtype).requires_grad_()
        for h in (4, 2, 2, 4)
    ]


def run(budget: Budget, *, compiled: bool = False) -> list[Tensor]:
    inputs = leaves()

    def f(*x: Tensor) -> Tensor:
        return video_sparse_attention(*x[:3], LAYOUT, budget, x[3])

    out = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


BUDGETS = [Budget(keep_ratio=0.25), Budget(top_k=4, keep_self=True, keep_first=1), Budget(top_p=0.5)]
WHOLE = [run(budget) for budget in BUDGETS]


@pytest.mark.parametrize("case", range(len(BUDGETS)), ids=[str(b) for b in BUDGETS])
def test_chunks_change_nothing(case: int, rows_at_once: int) -> None:
    for ours, whole in zip(run(BUDGETS[case]), WHOLE[case], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows_at_once", [5], indirect=True)
def test_chunks_compile_in_one_graph(rows_at_once: int) -> None:
    for ours, whole in zip(run(BUDGETS[0], compiled=True), WHOLE[0], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


def test_no_tensor_exceeds_the_bound(rows_at_once: int) -> None:
    """In selection and in both directions of the compressed branch. With head_dim 1 only scores could be larger."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    q, k, v = (torch.randn(2, 12, h, 1, dtype=torch.float64, device=DEVICE).requires_grad_() for h in (4, 2, 2))
    layout = TileLayout((12,), (1,))
    with Watch():
        PooledTopK().plan(q, k, layout, Budget(top_k=3))
        compressed_attention(q, k, v, 1.0).sum().backward()
    assert 0 < largest <= rows_at_once * SCORES_OF_A_ROW
