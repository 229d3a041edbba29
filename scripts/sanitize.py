"""Every GPU kernel once, on small shapes, for NVIDIA's compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python scripts/sanitize.py

Names of backends as arguments restrict it to those. Ragged blocks, empty rows and grouped heads are in every problem.

racecheck follows threads. In the hopper kernels one lane of a warp arrives at a barrier for all, after __syncwarp, and
racecheck would report what the other lanes read before. So here they are compiled with all 32 lanes arriving: the same
protocol, in a form that it can follow.
"""

from __future__ import annotations

import sys
import time

import torch

from openvsa import BlockPlan, Budget, TileLayout, block_sparse_attention, video_sparse_attention
from openvsa.ops.backends.hopper import compiler

DEVICE = torch.device("cuda")
BLOCKS = {  # lengths of query and of key blocks
    "64x64": ((64, 64, 9, 64, 33), (64, 17, 64, 64)),
    "128x64": ((128, 128, 70, 128), (64, 64, 40, 64, 64)),
    "128x128": ((128, 90, 128), (128, 128, 77)),
    "63x63": ((63, 63, 9, 40), (63, 17, 63, 63)),  # no tile is full: copies take 63 rows
    "126x63": ((126, 70, 126), (63, 63, 40, 63)),
}


def offsets(lens: tuple[int, ...]) -> list[int]:
    return torch.tensor((0, *lens)).cumsum(0).tolist()


def attend(backend: str, blocks: str, head_dim: int) -> None:
    q_lens, kv_lens = BLOCKS[blocks]
    mask = torch.rand(1, 4, len(q_lens), len(kv_lens)) < 0.6
    mask[:, :, 1] = False
    plan = BlockPlan.from_block_mask(mask.to(DEVICE), offsets(q_lens), offsets(kv_lens))
    sizes = (sum(q_lens), 4), (sum(kv_lens), 2), (sum(kv_lens), 2)
    leaves = [
        torch.randn(1, seq, heads, head_dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for seq, heads in sizes
    ]
    out, lse = block_sparse_attention(*leaves, plan, backend=backend, return_lse=True)
    finite = lse.masked_fill(lse.isinf(), 0)
    torch.autograd.grad(out.float().square().sum() + finite.sum(), leaves)


def select(backend: str) -> None:
    layout = TileLayout((5, 6, 9), (4, 4, 4), prefix=20)
    leaves = [
        torch.randn(1, layout.num_tokens, 2, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(4)
    ]
    out = video_sparse_attention(*leaves[:3], layout, Budget(top_k=3), leaves[3], backend=backend)
    torch.autograd.grad(out.float().square().sum(), leaves)


def main() -> None:
    compiler.ARRIVING_LANES = 32
    torch.manual_seed(0)
    begin = time.perf_counter()
    for backend in sys.argv[1:] or ("hopper", "triton"):
        for head_dim in (64, 128):
            for blocks in BLOCKS:
                attend(backend, blocks, head_dim)
                torch.cuda.synchronize()
                print(f"{time.perf_counter() - begin:6.1f} s  {backend} {blocks} head_dim {head_dim}", flush=True)
        select(backend)
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - begin:6.1f} s  {backend}: the whole op", flush=True)


if __name__ == "__main__":
    main()
