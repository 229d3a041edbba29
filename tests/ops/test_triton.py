"""What is particular to the Triton kernels: how they read memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from helpers import DEVICE, Case, Inputs, equal_lens, make_inputs, random_lens, run_reference
from openvsa import block_sparse_attention
from openvsa.ops import custom_op
from openvsa.ops.backends import triton as triton_kernels

pytestmark = pytest.mark.triton

EQUAL = Case("equal", equal_lens(96, 32), equal_lens(128, 32), batch=2, heads=4, kv_heads=2, plan_heads=4, head_dim=16)
RAGGED = Case("ragged", random_lens(3, 1, 40, seed=1), random_lens(4, 1, 40, seed=2), batch=2, head_dim=16)


def run(inputs: Inputs, scale: float | None = None) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, inputs.plan, scale=scale, backend="triton", return_lse=True)
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each kernel that ran read through tensor maps, in order."""
    seen: list[bool] = []
    options = triton_kernels._options

    def watched(*args: Any) -> dict[str, Any]:
        result = options(*args)
        seen.append(result["MAPPED"])
        return result

    monkeypatch.setattr(triton_kernels, "_options", watched)
    return seen


@pytest.mark.parametrize("case", [EQUAL, RAGGED], ids=str)
@pytest.mark.parametrize("far", ["batch", "token", "head"])
def test_offsets_beyond_31_bits(case: Case, far: str) -> None:
    """Tensors whose last elements lie more than 2**31 elements after their first give the same bits as close ones."""
    inputs = make_inputs(replace(case, batch=3, name=f"far-{case}"), torch.bfloat16)
    step = {"batch": 2**30 + 8, "token": 2**24 - 8, "head": 2**30 + 8}[far]
    if far == "token":  # 130 steps, so that more than the last block is out of reach
        lens = equal_lens(160, 32) if case is EQUAL else random_lens(12, 12, 20, seed=3)
        inputs = make_inputs(replace(case, q_lens=lens, kv_lens=lens, batch=1, name=f"far-{case}"), torch.bfloat16)
    if far == "head":
        inputs = make_inputs(replace(case, heads=3, kv_heads=3, plan_heads=1, name=f"far-{case}"), torch.bfloat16)
    # Memory that nobody touches costs nothing: of these gigabytes only a few pages come to exist.
    room = torch.empty(2**31 + 2**30, dtype=torch.bfloat16, device=DEVICE)
    distant, start = [], 0
    for x in (*inputs[:3], inputs.grad_out):
        strides = dict(zip(("batch", "token", "head"), x.stride(), strict=False))
        strides[far] = step
        if far == "head":
            strides["token"] = x.shape[3]
            strides["batch"] = x.shape[1] * x.shape[3]
        y = room.as_strided(x.shape, (strides["batch"], strides["token"], strides["head"], 1), start)
        y.copy_(x)
        assert sum((n - 1) * s for n, s in zip(y.shape, y.stride(), strict=True)) > 2**31
        distant.append(y)
        start += 2**18 if far != "token" else 4096
    there = run(inputs._replace(q=distant[0], k=distant[1], v=distant[2], grad_out=distant[3]))
    assert all(torch.equal(a, b) for a, b in zip(there, run(inputs), strict=True))


def test_equal_blocks_are_read_through_tensor_maps(mapped: list[bool]) -> None:
    run(make_inputs(EQUAL, torch.bfloat16))
    assert mapped == [True, True, True]


@pytest.mark.parametrize(
    "case",
    [
        RAGGED,
        replace(EQUAL, name="last-block-short", q_lens=equal_lens(90, 32), kv_lens=equal_lens(120, 32)),
        replace(EQUAL, name="blocks-of-24", q_lens=equal_lens(96, 24), kv_lens=equal_lens(96, 24)),
        replace(EQUAL, name="steps-not-of-16-bytes", head_dim=20),
    ],
    ids=str,
)
def test_all_else_is_read_by_pointers(mapped: list[bool], case: Case) -> None:
    run(make_inputs(case, torch.bfloat16))
    assert mapped == [False, False, False]


def test_four_bytes_are_read_by_pointers(mapped: list[bool]) -> None:
    run(make_inputs(EQUAL, torch.float32))
    assert mapped == [False, False, False]


@pytest.mark.parametrize("head_dim", [16, 72, 128])
def test_both_ways_of_reading_agree(mapped: list[bool], head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(replace(EQUAL, head_dim=head_dim, kv_lens=equal_lens(256, 128)), torch.bfloat16)
    by_maps = run(inputs)
    monkeypatch.setattr(triton_kernels, "_mappable", lambda x: False)
    by_pointers = run(inputs)
    assert mapped == [True, True, True, False, False, False]
    for a, b in zip(by_maps, by_pointers, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale: float) -> None:
    inputs = make_inputs(RAGGED, torch.float32)
    exact = run_reference(inputs._replace(scale=scale), torch.float64)
    for got, true in zip(run(inputs, scale), exact, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-4)


def test_the_output_is_given_back_before_there_are_gradients_of_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the graph is kept."""
    inputs = make_inputs(RAGGED, torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    outputs: list[StorageWeakRef] = []
    alive: list[bool] = []
    backward_q, backward_kv = triton_kernels.backward_q, triton_kernels.backward_kv

    def first(*args: Any) -> Any:
        outputs.append(StorageWeakRef(args[5].untyped_storage()))
        return backward_q(*args)

    def second(*args: Any) -> Any:
        gc.collect()  # Triton's interpreter leaves cycles behind that hold its arguments
        alive.append(not outputs[-1].expired())
        return backward_kv(*args)

    monkeypatch.setattr(triton_kernels, "backward_q", first)
    monkeypatch.setattr(triton_kernels, "backward_kv", second)
    total = block_sparse_attention(*leaves, inputs.plan, backend="triton").sum()
    kept = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(map(torch.equal, kept, torch.autograd.grad(total, leaves)))
    assert alive == [True, False]


def test_the_halves_of_the_backward_pass_as_operators() -> None:
    inputs = make_inputs(Case("opcheck", (3, 1, 4), (2, 5, 1, 2), heads=2, kv_heads=1, head_dim=16), torch.float32)
    q, k, v, plan = *inputs[:3], inputs.plan
    lists = (
        plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, *plan.transpose_csr(),
        plan.q_blocks.max_len, plan.kv_blocks.max_len, 0.5, "triton",
    )  # fmt: skip
    out, lse = custom_op._attention(q, k, v, *lists)
    checks = ("test_schema", "test_faketensor")
    arguments = inputs.grad_out, inputs.grad_lse, q, k, v, out, lse, *lists
    torch.library.opcheck(torch.ops.openvsa.block_sparse_attention_backward_q.default, arguments, test_utils=checks)
    _, terms = custom_op._attention_backward_q(*arguments)
    arguments = inputs.grad_out, q, k, v, lse, terms, *lists
    torch.library.opcheck(torch.ops.openvsa.block_sparse_attention_backward_kv.default, arguments, test_utils=checks)


def test_the_halves_compile_in_one_graph() -> None:
    inputs = make_inputs(RAGGED, torch.float32)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q * 2, k, v, inputs.plan, backend="triton") * 3

    results = []
    for compiled in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = compiled(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, inputs.grad_out)))
    for eager, found in zip(*results, strict=True):
        assert torch.equal(found, eager)
