"""Query blocks of 128 tokens over key blocks of 64 on a GPU: exact, and without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import random_lens, random_mask
from openvsa import BlockPlan, Budget, TileLayout, video_sparse_attention
from openvsa.layout import BlockOffsets

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def test_coarsening_and_refining_do_not_wait_and_are_those_of_the_cpu() -> None:
    blocks = BlockOffsets(random_lens(13, 1, 32, seed=0))
    mask = random_mask((2, 3, 13, 13), 0.3, torch.Generator().manual_seed(0))
    plan = BlockPlan.from_block_mask(mask.to(DEVICE), blocks, blocks, max_blocks=13)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        coarse = plan.coarsen(q=2, kv=3)
        fine = coarse.refine(blocks, blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = BlockPlan.from_block_mask(mask, blocks, blocks).coarsen(q=2, kv=3)
    for found, same in ((coarse, expected), (fine, expected.refine(blocks, blocks))):
        found.validate()
        assert torch.equal(found.block_mask().cpu(), same.block_mask())


@pytest.mark.parametrize("grid", [(4, 8, 16), (5, 9, 10)], ids=["even", "ragged"])
def test_vsa_agrees_with_fp64(grid: tuple[int, ...]) -> None:
    """In bf16, every tile kept: which tiles are kept would depend on the rounding of the means."""
    layout = TileLayout(grid, (4, 4, 4), prefix=70, q_tiles=(1, 1, 2))
    rounded = [torch.randn(1, layout.num_tokens, h, 64, device=DEVICE).bfloat16() for h in (4, 2, 2, 4)]

    def run(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = video_sparse_attention(*inputs[:3], layout, Budget(keep_ratio=1.0), inputs[3])
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    for found, expected in zip(run(rounded), run([x.double() for x in rounded]), strict=True):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 0.02
