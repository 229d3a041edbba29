"""What is asked for inside a mode of PyTorch's neither fails there nor spoils what comes after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from openvsa import BlockPlan, Budget, TileLayout, UnsupportedError, block_sparse_attention, video_sparse_attention
from openvsa.layout import shelf
from openvsa.nn import VideoSparseAttention

GRID, TILE = (3, 4, 5), (2, 2, 2)
OFFSETS = [0, 3, 5]
HALF = Budget(keep_ratio=0.5)


def vsa(layout: TileLayout) -> Tensor:
    q, k, v, weight = (torch.ones(2, 60, 2, 8, device="cpu", requires_grad=True) for _ in range(4))
    out = video_sparse_attention(q, k, v, layout, HALF, weight)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
    return out


def plans() -> list[BlockPlan]:
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="cpu")
    starts, indices = torch.tensor([[[0, 1, 2]]], device="cpu").int(), torch.tensor([[[0, 1]]], device="cpu").int()
    plan = BlockPlan.dense(OFFSETS, OFFSETS)
    return [
        plan,
        plan.transpose(),
        plan.coarsen(2),
        plan.refine([0, 1, 3, 5]),
        plan | plan.with_dense_blocks([0], [1]),
        BlockPlan.from_block_mask(mask, OFFSETS, OFFSETS),
        BlockPlan.from_block_mask(mask, OFFSETS, OFFSETS, max_blocks=2),
        BlockPlan.from_scores(mask.float(), HALF, OFFSETS, OFFSETS),
        BlockPlan.from_csr(starts, indices, OFFSETS, OFFSETS),
    ]


def test_fake_tensors_before_and_after_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those who estimate the memory of a model do before they run it."""
    monkeypatch.setattr(shelf, "_NAMES", {})
    layout = TileLayout(GRID, TILE, q_tiles=(1, 1, 2))
    attend = VideoSparseAttention(16, 2, tile=TILE)
    expected = attend(torch.ones(1, 60, 16), GRID)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=False):
            assert vsa(layout).shape == (2, 60, 2, 8)
            assert vsa(TileLayout(GRID, TILE)).shape == (2, 60, 2, 8)
            assert VideoSparseAttention(16, 2, tile=TILE)(torch.ones(1, 60, 16), GRID).shape == (1, 60, 16)
            tokens = torch.ones(1, 5, 2, 8)
            for plan in plans():
                assert block_sparse_attention(tokens, tokens, tokens, plan).shape == tokens.shape
        assert type(vsa(layout)) is Tensor
        assert torch.equal(attend(torch.ones(1, 60, 16), GRID), expected)


def test_a_default_device_is_no_business_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs make models on it, and layouts and plans on the way."""
    monkeypatch.setattr(shelf, "_NAMES", {})
    with torch.device("meta"):
        layout = TileLayout(GRID, TILE, prefix=3, q_tiles=(1, 2, 1))
        for tensor in (layout.permutation, layout.block_offsets, layout.blocks.padded_slots(torch.device("cpu"))):
            assert tensor.device.type == "cpu"
        for plan in plans():
            assert plan.device.type == "cpu"
        out = vsa(TileLayout(GRID, TILE))
    assert torch.equal(out, vsa(TileLayout(GRID, TILE)))


def test_a_plan_that_was_looked_at_in_inference_mode_can_train() -> None:
    plan = BlockPlan.dense(OFFSETS, OFFSETS)
    with torch.inference_mode():
        plan.transpose()
    q = torch.ones(1, 5, 2, 8, requires_grad=True)
    for one in (plan, plan.transpose()):
        block_sparse_attention(q, q, q, one).sum().backward()
    assert q.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated")
def test_a_trace_by_jit_is_refused() -> None:
    """It would keep what kernels computed as constants."""
    plan, x, attend = BlockPlan.dense(OFFSETS, OFFSETS), torch.ones(1, 5, 2, 8), VideoSparseAttention(8, 2, tile=TILE)
    refused = pytest.raises(UnsupportedError, match=r"torch\.jit\.trace cannot see .* use torch\.export")
    with refused:
        torch.jit.trace(lambda x: block_sparse_attention(x, x, x, plan), (x,))
    with refused:
        torch.jit.trace(lambda x: attend(x, GRID), (torch.ones(1, 60, 8),))


class Fixed(nn.Module):
    """Of one lattice: torch.export takes tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = VideoSparseAttention(16, 2, tile=TILE)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, GRID)


def test_an_exported_module_takes_any_batch() -> None:
    model, x = Fixed(), torch.randn(5, 60, 16)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},))
    torch.testing.assert_close(program.module()(x), model(x))
