"""video_sparse_attention through the kernels of layout, plan and select, against the same call without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import DEVICE
from openvsa import Budget, TileLayout, video_sparse_attention
from plain import both

pytestmark = pytest.mark.triton

LAYOUTS = [
    TileLayout((3, 5, 3), (2, 2, 3)),
    TileLayout((3, 5, 3), (2, 2, 3), prefix=9, suffix=2),
    TileLayout((4, 6), (2, 3), prefix=7, q_tiles=(1, 2)),
]
# The sparse branch itself runs the same code on both sides.
BACKEND = "cpu" if DEVICE.type == "cpu" else "triton"


def attention(layout: TileLayout, *leaves: Tensor, budget: Budget) -> Tensor:
    weight = leaves[3] if len(leaves) > 3 else None
    return video_sparse_attention(*leaves[:3], layout, budget, weight, backend=BACKEND)


def make(layout: TileLayout, branch: bool) -> list[Tensor]:
    heads = (2, 1, 1, 2) if branch else (2, 1, 1)
    return [torch.randn(1, layout.num_tokens, h, 16).to(DEVICE).requires_grad_() for h in heads]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
def test_the_same_result_and_gradients(layout: TileLayout, branch: bool) -> None:
    def run() -> list[Tensor]:
        leaves = make(layout, branch)
        out = attention(layout, *leaves, budget=Budget(keep_ratio=0.25, keep_first=1))
        return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(DEVICE))]

    for ours, theirs in zip(*both(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    layout = LAYOUTS[1]
    leaves = make(layout, True)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            out = attention(layout, *leaves, budget=Budget(top_k=2))
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class Calls(TorchDispatchMode):
    """The names of our operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "openvsa":
            self.names.append(func.name().removeprefix("openvsa::"))
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_the_branch_weight_waits_for_that_of_attention() -> None:
    """Both at a time would need the memory of one more tensor of the size of q."""
    layout = LAYOUTS[1]
    leaves = make(layout, True)
    out = attention(layout, *leaves, budget=Budget(top_k=2))
    with Calls() as calls:
        torch.autograd.grad(out.sum(), leaves)
    attention_ends = max(i for i, name in enumerate(calls.names) if name.startswith("block_sparse_attention_backward"))
    assert attention_ends < calls.names.index("lazy_product_backward")


def test_compiles_in_one_graph() -> None:
    layout = TileLayout((4, 6), (2, 3), prefix=7)
    leaves = make(layout, True)

    def f(*leaves: Tensor) -> Tensor:
        return attention(layout, *leaves, budget=Budget(keep_ratio=0.25))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    eager = f(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled.square().sum(), leaves),
        torch.autograd.grad(eager.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
