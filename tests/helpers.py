"""Attention problems for the tests of ops, and what the oracle says about them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from openvsa import BlockPlan, TileLayout
from openvsa.bench.oracle import Results, run_reference, sensitivity
from openvsa.ops.capability import Problem, capability_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The lattices of DESIGN.md: Wan at two resolutions, two of other families, an even one, and two tiny ones.
LATTICES = ((21, 30, 52), (21, 45, 80), (13, 30, 45), (28, 30, 53), (20, 48, 80), (5, 7, 9), (1, 1, 1))


@dataclass(frozen=True)
class Case:
    """One problem: blocks, heads, which blocks are read, and how the tensors lie in memory.

    `share` is how likely a block is read. Row 1 reads nothing if `empty_row`. `size` multiplies q, k and v. Tensors are
    views into buffers of NaN if `poison`; `strides` names the order of dimensions in memory, last fastest.
    `shift` is added to q and taken from k: scores are then about its negative square, times the root of head_dim.
    With `sampled`, only that many query blocks get gradients and are compared, so that long sequences stay cheap.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    plan_batch: int = 1
    plan_heads: int = 1
    share: float = 0.5
    empty_row: bool = False
    size: float = 1.0
    shift: float = 0.0
    poison: bool = False
    strides: str = "bshd"
    sampled: int | None = None

    def __str__(self) -> str:
        return self.name

    def problem(self, dtype: torch.dtype, *, needs_grad: bool) -> Problem:
        """As the registry sees it."""
        uniform = all(len(set(lens[:-1])) <= 1 and lens[-1] <= lens[0] for lens in (self.q_lens, self.kv_lens))
        return Problem(
            device_type=DEVICE.type, capability=capability_of(DEVICE), dtype=dtype,
            head_dim=self.head_dim, head_dim_v=self.head_dim,
            batch=self.batch, num_heads=self.heads, num_kv_heads=self.kv_heads,
            q_tokens=sum(self.q_lens), kv_tokens=sum(self.kv_lens),
            max_q_block=max(self.q_lens), max_kv_block=max(self.kv_lens), uniform=uniform,
            needs_grad=needs_grad, deterministic=False,
        )  # fmt: skip

    @property
    def dense_scores(self) -> int:
        """Scores that an implementation which skips nothing would make."""
        return self.batch * self.heads * sum(self.q_lens) * sum(self.kv_lens)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    grad_out: Tensor
    grad_lse: Tensor
    scale: float
    rows: list[int] | None  # the sampled query blocks


def offsets(lens: tuple[int, ...] | list[int]) -> list[int]:
    return [0, *accumulate(lens)]


def equal_lens(tokens: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, tokens - start) for start in range(0, tokens, size))


def random_lens(count: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def random_mask(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """bool, with at least one True in every row."""
    mask = torch.rand(shape, generator=generator) < share
    return mask.scatter(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=generator), True)


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """The tensors of a case, the same on every machine up to rounding."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    shape = (case.plan_batch, case.plan_heads, len(case.q_lens), len(case.kv_lens))
    mask = random_mask(shape, case.share, generator)
    if case.empty_row:
        mask[0, 0, 1] = False
    plan = BlockPlan.from_block_mask(mask, offsets(case.q_lens), offsets(case.kv_lens)).to(DEVICE)

    seq_q, seq_kv = sum(case.q_lens), sum(case.kv_lens)
    rows = None
    if case.sampled is not None:
        picked = torch.randperm(len(case.q_lens), generator=generator)[: case.sampled - 1].tolist()
        rows = sorted({*picked, len(case.q_lens) - 1})
    touched = torch.ones(seq_q) if rows is None else torch.zeros(seq_q).index_fill(0, tokens_of(case.q_lens, rows), 1.0)

    def make(seq: int, heads: int, size: float, weight: Tensor | None = None, shift: float = 0.0) -> Tensor:
        x = torch.randn(case.batch, seq, heads, case.head_dim, generator=generator) * size + shift
        x = x if weight is None else x * weight[:, None, None]
        return place(x.to(dtype), case)

    q = make(seq_q, case.heads, case.size, shift=case.shift)
    k, v = (make(seq_kv, case.kv_heads, case.size, shift=shift) for shift in (-case.shift, 0.0))
    grad_out = make(seq_q, case.heads, 1.0, touched)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_lse = torch.randn(case.batch, case.heads, seq_q, generator=generator) * touched
    return Inputs(q, k, v, plan, grad_out, grad_lse.to(DEVICE, lse_dtype), case.head_dim**-0.5, rows)


def place(x: Tensor, case: Case) -> Tensor:
    """x on the device, with the strides and the surroundings that the case asks for."""
    order = ["bshd".index(letter) for letter in case.strides]
    moved = x.permute(order)
    if case.poison:
        buffer = moved.new_full([n + 3 if i < 3 else n for i, n in enumerate(moved.shape)], float("nan"))
        home = buffer.to(DEVICE)[: moved.shape[0], : moved.shape[1], : moved.shape[2]]
        home.copy_(moved)
    else:
        home = moved.contiguous().to(DEVICE)
    return home.permute([order.index(i) for i in range(4)])


def tokens_of(lens: tuple[int, ...], blocks: list[int]) -> Tensor:
    starts = offsets(lens)
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in blocks])


def sample(case: Case, inputs: Inputs) -> tuple[Inputs, Tensor, Tensor]:
    """The part of a problem that its sampled rows see: their queries, the keys that any of them reads. Also the tokens
    of both."""
    if inputs.rows is None:
        everything = (torch.arange(sum(lens), device=DEVICE) for lens in (case.q_lens, case.kv_lens))
        return inputs, *everything
    mask = inputs.plan.block_mask()[:, :, inputs.rows].cpu()
    columns = mask.flatten(0, 2).any(0).nonzero().flatten().tolist()
    plan = BlockPlan.from_block_mask(
        mask[..., columns],
        offsets([case.q_lens[i] for i in inputs.rows]),
        offsets([case.kv_lens[j] for j in columns]),
    ).to(DEVICE)
    q_tokens, kv_tokens = tokens_of(case.q_lens, inputs.rows), tokens_of(case.kv_lens, columns)
    q_tokens, kv_tokens = q_tokens.to(DEVICE), kv_tokens.to(DEVICE)
    part = Inputs(
        inputs.q[:, q_tokens], inputs.k[:, kv_tokens], inputs.v[:, kv_tokens], plan,
        inputs.grad_out[:, q_tokens], inputs.grad_lse[..., q_tokens], inputs.scale, None,
    )  # fmt: skip
    return part, q_tokens, kv_tokens


class Expected(NamedTuple):
    exact: Results
    naive: Results
    terms: Results


@lru_cache(maxsize=16)
def expected(case: Case, dtype: torch.dtype) -> Expected:
    """What the oracle says in fp64, and what plain torch makes of it in the dtype that the tolerance asks for."""
    part, _, _ = sample(case, make_inputs(case, dtype))
    exact = run_reference(part, torch.float64)
    naive_dtype = torch.float32 if dtype == torch.float64 else dtype
    return Expected(exact, run_reference(part, naive_dtype), sensitivity(part, exact))


def lattice_cases() -> Iterator[Case]:
    """DESIGN.md's lattices in tiles of 4 x 4 x 4, with one head of keys for two of queries."""
    for grid in LATTICES:
        lens = TileLayout(grid, (4, 4, 4)).block_lens
        yield Case(
            f"lattice-{'x'.join(map(str, grid))}",
            lens,
            lens,
            kv_heads=1,
            head_dim=16,
            share=min(8 / len(lens), 0.12),
            sampled=4 if len(lens) > 100 else None,
        )
