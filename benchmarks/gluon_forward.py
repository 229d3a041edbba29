"""The forward pass written in Gluon, beside our backends: what the other language that comes with Triton would give.

    python benchmarks/gluon_forward.py [--out FILE]

It needs an sm_90 GPU; it is not part of the package. Triton 3.6 and 3.9 compile it. All contenders run in one process,
in turns, at B=1 H=12 S=32768 D=128 bf16, blocks of 64 x 64, density 1/8: the variants below of one Gluon kernel, the
backends `hopper` and `triton`, and cuDNN's dense attention. TFLOP/s are those of computed pairs. `random` lists are
drawn for each query block, `shared` ones eight query blocks at a time with noise. A variant is timed only if its out
and lse are those of `hopper` to 1e-2 of their norm; one that does not compile is named and left out.

What came of it: docs/dev/kernel-log.md, the route to Hopper.

The kernel knows no tails and no empty lists: every block is 64 tokens, every query block reads at least one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from hopper_variants import DENSITY, HEADS, TOKENS, inputs, make_plan, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.compiler.errors import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as multiply
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.errors import OutOfResources, PTXASError

from openvsa import BlockPlan, block_sparse_attention

BLOCK, HEAD_DIM, DENSE = 64, 128, "cuDNN, dense"
# Triton 3.9 has other names than 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
Run = Callable[[], tuple[Tensor, Tensor]]


# Programs of a multiprocessor x consumers of each, where q lies: how many consumers (four warps, with a query block, a
# list, two rings and a loading warp of their own), key tiles and value tiles of a ring (16 KiB each), registers of a
# thread at launch (where all loading warps count as one more consumer), registers of a consumer then, q in registers.
# Three programs of one consumer have 80 registers at launch, fewer than the 94 that the assembler asks for.
VARIANTS = {
    "Gluon, 1 x 2 consumers, q in shared memory": (2, 3, 3, 168, 240, False),
    "Gluon, 1 x 2 consumers, q in registers": (2, 3, 3, 168, 240, True),
    "Gluon, 2 x 1 consumers, q in shared memory": (1, 3, 3, 128, 232, False),
    "Gluon, 2 x 1 consumers, q in registers": (1, 3, 3, 128, 232, True),
    "Gluon, 1 x 3 consumers, q in shared memory": (3, 2, 1, 128, 160, False),
}

ROWS, DIMS, LN_2 = gl.constexpr(BLOCK), gl.constexpr(HEAD_DIM), gl.constexpr(math.log(2.0))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16]))
Q_OPERAND = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
P_OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
SCORE_ROWS, SUM_ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value)), gl.constexpr(gl.SliceLayout(1, SUMS.value))
TILE = gl.NVMMASharedLayout.get_default_for([BLOCK, HEAD_DIM], gl.bfloat16)


@gluon.jit
def _ring(x_map, TILES: gl.constexpr):
    """Room for tiles, and for each a barrier that says when it is loaded and one for when it is read."""
    tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, ROWS, DIMS], x_map.layout)
    full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(TILES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    return tiles, full, empty


@gluon.jit
def _fill(x_map, row, column, ring, number):
    """Load tile `number` of a list as soon as its slot is free."""
    tiles, full, empty = ring
    slot = number % tiles.shape[0]
    mbarrier.wait(empty.index(slot), number // tiles.shape[0] & 1 ^ 1)
    mbarrier.expect(full.index(slot), x_map.block_type.nbytes)
    load_tile(x_map, [row, column], full.index(slot), tiles.index(slot))


@gluon.jit
def _loaded(ring, number, wanted=True):
    """The tile, once it is there, or at once where it is not wanted."""
    tiles, full, _ = ring
    mbarrier.wait(full.index(number % tiles.shape[0]), number // tiles.shape[0] & 1, pred=wanted)
    return tiles.index(number % tiles.shape[0])


@gluon.jit
def _release(ring, number):
    """One thread says that all four warps are done with the tile; the compiler puts a barrier before it."""
    mbarrier.arrive(ring[2].index(number % ring[0].shape[0]), count=1)


@gluon.jit
def _thread_sums(x):
    """Sums over the columns that one thread has, [rows, 4]: a thread has two of every eight next to each other."""
    return gl.sum(gl.sum(x.reshape([ROWS, ROWS // 8, 4, 2]), 3), 1)


@gluon.jit
def _load(maps, work, buffers):
    """The loading warp of one consumer: its query block, then the tiles in the order in which they are read: the keys
    of a step come before the values of the one before."""
    q_map, k_map, v_map, _ = maps
    kv_indices, _, count, row, column, _ = work
    q_tile, q_full, k_ring, v_ring = buffers
    mbarrier.expect(q_full, q_map.block_type.nbytes)
    load_tile(q_map, [row, column], q_full, q_tile)
    index = gl.load(kv_indices)
    _fill(k_map, index * ROWS, column, k_ring, gl.to_tensor(0))
    for step in range(1, count):
        later = gl.load(kv_indices + step)
        _fill(k_map, later * ROWS, column, k_ring, step)
        _fill(v_map, index * ROWS, column, v_ring, step - 1)
        index = later
    _fill(v_map, index * ROWS, column, v_ring, count - 1)


@gluon.jit
def _consume(maps, work, buffers, Q_IN_REGISTERS: gl.constexpr):
    """One query block: the scores of the next keys and this step's values are multiplied while a softmax runs."""
    _, lse, count, row, column, scale = work
    q_tile, q_full, k_ring, v_ring = buffers
    mbarrier.wait(q_full, 0)
    q = q_tile.load(Q_OPERAND) if Q_IN_REGISTERS else q_tile
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    first = gl.to_tensor(0)
    s = multiply(q, _loaded(k_ring, first).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = wait(0, deps=[s])
    _release(k_ring, first)
    row_max = gl.max(s, 1) * scale
    weights = gl.exp2(s * scale - row_max[:, None])
    row_sum = _thread_sums(weights)
    SUM_PARTS: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    p = gl.convert_layout(weights.to(gl.bfloat16), P_OPERAND)
    acc = gl.zeros([ROWS, DIMS], gl.float32, SUMS)
    k_tile = _loaded(k_ring, first + 1, count > 1)
    for step in range(1, count):
        s = multiply(q, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc = multiply(p, _loaded(v_ring, step - 1), acc, is_async=True)
        s = wait(1, deps=[s])
        _release(k_ring, step)
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
        shrink = gl.exp2(row_max - new_max)
        weights = gl.exp2(s * scale - new_max[:, None])
        row_sum = row_sum * gl.convert_layout(shrink, SUM_PARTS)[:, None] + _thread_sums(weights)
        row_max = new_max
        # These two are here so that the assembler does not wait for the second product before the softmax.
        weights = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [weights], gl.float32, is_pure=False, pack=1)
        k_tile = _loaded(k_ring, step + 1, step + 1 < count)
        acc = wait(0, deps=[acc])
        _release(v_ring, step - 1)
        acc = acc * gl.convert_layout(shrink, SUM_ROWS)[:, None]
        p = gl.convert_layout(weights.to(gl.bfloat16), P_OPERAND)  # not before: the product still read it
    acc = wait(0, deps=[multiply(p, _loaded(v_ring, count - 1), acc, is_async=True)])
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), SCORE_ROWS)
    acc = acc / gl.convert_layout(row_sum, SUM_ROWS)[:, None]
    q_tile.store(acc.to(gl.bfloat16))  # no product reads it any more
    fence_async_shared()
    store_tile(maps[3], [row, column], q_tile)
    gl.store(lse + gl.arange(0, ROWS, SCORE_ROWS), (row_max + gl.log2(row_sum)) * LN_2)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["list_width", "q_blocks"])
def _forward_kernel(
    q_map, k_map, v_map, out_map, lse, kv_num_blocks, kv_indices, list_width, q_blocks, scale,
    CONSUMERS: gl.constexpr, K_TILES: gl.constexpr, V_TILES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
    WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    maps = (q_map, k_map, v_map, out_map)
    parts = ()
    for consumer in gl.static_range(CONSUMERS):
        q_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, DIMS], q_map.layout)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        buffers = (q_tile, q_full, _ring(k_map, K_TILES), _ring(v_map, V_TILES))
        list_row = gl.program_id(0) * CONSUMERS + consumer
        head, q_block = list_row // q_blocks, list_row % q_blocks
        kv_list, count = kv_indices + list_row * list_width, gl.load(kv_num_blocks + list_row)
        work = (kv_list, lse + list_row * ROWS, count, q_block * ROWS, head * DIMS, scale)
        parts = parts + ((work, buffers),)  # noqa: RUF005, Gluon has no unpacking
    fence_async_shared()
    gl.warp_specialize(
        [(_consume, (maps, part[0], part[1], Q_IN_REGISTERS)) for part in parts]
        + [(_load, (maps, part[0], part[1])) for part in parts],
        WARPS, REGISTERS,
    )  # fmt: skip


def gluon_forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, variant: str) -> tuple[Tensor, Tensor]:
    """out [1, S, H, D] and lse [1, H, S] of q, k and v [1, S, H, D]."""
    consumers, k_tiles, v_tiles, registers, consumer_registers, q_in_registers = VARIANTS[variant]
    tokens, heads = q.shape[1:3]
    out, lse = torch.empty_like(q), q.new_empty(1, heads, tokens, dtype=torch.float32)
    maps = [TensorDescriptor.from_tensor(x.view(tokens, -1), [BLOCK, HEAD_DIM], TILE) for x in (q, k, v, out)]
    _forward_kernel[(heads * tokens // BLOCK // consumers,)](
        *maps, lse, plan.kv_num_blocks, plan.kv_indices, plan.kv_indices.shape[-1], tokens // BLOCK,
        HEAD_DIM**-0.5 * math.log2(math.e),
        CONSUMERS=consumers, K_TILES=k_tiles, V_TILES=v_tiles, Q_IN_REGISTERS=q_in_registers,
        WARPS=(4,) * (consumers - 1) + (1,) * consumers,  # of all parts but the first consumer, as the registers
        REGISTERS=(consumer_registers,) * (consumers - 1) + (24,) * consumers, num_warps=4, maxnreg=registers,
    )  # fmt: skip
    return out, lse


def checked(label: str, run: Run, truth: tuple[Tensor, Tensor] | None) -> tuple[tuple[Tensor, Tensor], float] | None:
    """What the first call gives, and its seconds, compilation among them. None where it does not compile, or where it
    differs from `truth`."""
    print(label, end=": ", flush=True)
    start = time.perf_counter()
    try:
        results = run()
    except (CompilationError, PTXASError, OutOfResources) as error:
        fatal = [line for line in str(error).splitlines() if "fatal" in line]
        print(f"left out, {type(error).__name__}: {fatal[0] if fatal else error}", flush=True)
        return None
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    pairs = zip(results, truth or results, strict=True)
    apart = [float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs]
    right = all(x < 1e-2 for x in apart)  # not so for NaN
    print(f"out {apart[0]:.1e}, lse {apart[1]:.1e} apart{'' if right else ': WRONG, left out'}", flush=True)
    return (results, took) if right else None


def thrice(run: Callable[[], object]) -> None:
    for _ in range(3):
        run()


@torch.no_grad()
def main(out: Path | None) -> None:
    q, k, v, _ = inputs(HEAD_DIM)
    dense = partial(scaled_dot_product_attention, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}",
        f"{'contender':44} {'lists':6} {'ms':>6} {'TFLOP/s':>8} {'first call, s':>14}",
    ]
    for lists in ("random", "shared"):
        plan = make_plan(BLOCK, BLOCK, local=lists == "shared")
        attend = partial(block_sparse_attention, q, k, v, plan, return_lse=True)
        runs: dict[str, Run] = {name: partial(attend, backend=name) for name in ("hopper", "triton")}
        runs |= {label: partial(gluon_forward, q, k, v, plan, label) for label in VARIANTS}
        truth, firsts = None, {}
        for label, run in runs.items():
            if first := checked(label, run, truth):
                truth, firsts[label] = truth or first[0], first[1]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense()
            racing = {label: partial(thrice, runs[label]) for label in firsts} | {DENSE: partial(thrice, dense)}
            rounds = [{label: seconds(run, 1) / 3 for label, run in racing.items()} for _ in range(7)]
        for label in racing:
            median = statistics.median(times[label] for times in rounds)
            rate = 4 * HEAD_DIM * TOKENS**2 * HEADS * (DENSITY if label in firsts else 1) / median / 1e12
            compiling = f"{firsts[label]:14.1f}" if lists == "random" and label in firsts else ""
            lines.append(f"{label:44} {lists:6} {median * 1e3:6.3f} {rate:8.0f} {compiling}".rstrip())
    print(*lines, sep="\n")
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here")
    torch.manual_seed(0)
    main(parser.parse_args().out)
