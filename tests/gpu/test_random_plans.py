"""Random ragged problems on the device, for our own kernels: right by the oracle, and the same bits again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import DEVICE, Case, expected, make_inputs
from openvsa import block_sparse_attention
from openvsa.ops.backends.hopper import compiler
from openvsa.ops.registry import backends
from tolerance import FORWARD, GRADIENT, excess

pytestmark = pytest.mark.gpu

KERNELS = [b.name for b in backends() if b.name in ("hopper", "triton") and not b.available(DEVICE.type)]
CHUNKS, SEEDS_EACH = 20, 50  # 1,000 seeds, in tests that workers can share


def random_case(seed: int) -> Case:
    """Blocks of 1 to 128 tokens (or all of one length), up to four heads, any share of blocks read."""
    draw = random.Random(seed)

    def lens() -> tuple[int, ...]:
        longest = draw.choice((16, 40, 64, 100, 128))
        count = draw.randint(1, 9)
        return tuple(longest if draw.random() < 0.4 else draw.randint(1, longest) for _ in range(count))

    heads = draw.choice((1, 2, 4))
    batch = draw.choice((1, 2))
    return Case(
        f"seed-{seed}", lens(), lens(), batch=batch, heads=heads, kv_heads=draw.choice((1, heads)),
        head_dim=draw.choice((64, 128)), plan_batch=draw.choice((1, batch)), plan_heads=draw.choice((1, heads)),
        share=draw.choice((0.05, 0.3, 0.7, 1.0)), size=draw.choice((1.0, 4.0)), poison=draw.random() < 0.3,
        strides=draw.choice(("bshd", "bhsd", "sbhd")),
    )  # fmt: skip


def run(case: Case, dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
    inputs = make_inputs(case, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = block_sparse_attention(*leaves, inputs.plan, backend=kernel, return_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, (inputs.grad_out, inputs.grad_lse))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_plans(chunk: int, kernel: str) -> None:
    for seed in range(chunk * SEEDS_EACH, (chunk + 1) * SEEDS_EACH):
        case, dtype = random_case(seed), (torch.bfloat16, torch.float16)[seed % 2]
        exact, naive, terms = expected(case, dtype)
        for name, found in run(case, dtype, kernel).items():
            rule = GRADIENT if name[0] == "d" else FORWARD
            over = excess(found, getattr(naive, name), getattr(exact, name), rule, getattr(terms, name))
            assert not over, (seed, name, over)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("longest", [64, 128])
def test_ten_runs_give_the_same_bits(kernel: str, head_dim: int, longest: int) -> None:
    case = replace(
        random_case(7), name="ten-runs", head_dim=head_dim, q_lens=(longest,) * 40, kv_lens=(longest, 9) * 20
    )
    first = run(case, torch.bfloat16, kernel)
    for _ in range(9):
        again = run(case, torch.bfloat16, kernel)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif("hopper" not in KERNELS, reason="the kernels are for sm_90a")
def test_a_team_that_takes_many_work_items_leaves_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In problems this small a team of a whole GPU has one item at most; on one multiprocessor it has many."""
    for seed in range(40):
        case, dtype = random_case(seed), (torch.bfloat16, torch.float16)[seed % 2]
        wide = run(case, dtype, "hopper")
        with monkeypatch.context() as patch:
            patch.setattr(compiler, "_multiprocessors", lambda device: 1)
            narrow = run(case, dtype, "hopper")
        assert all(torch.equal(wide[name], narrow[name]) for name in wide), seed
