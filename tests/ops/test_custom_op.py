"""The op as torch.library and torch.compile see it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Case, make_inputs, offsets
from openvsa import BlockPlan, UnsupportedError, block_sparse_attention
from openvsa.ops import custom_op

CASE = Case(
    "custom-op", (3, 1, 4), (2, 5, 1, 2), batch=2, heads=2, kv_heads=1, head_dim=4, plan_heads=2, empty_row=True
)  # fmt: skip
EXAMPLES = [
    CASE,
    replace(CASE, name="uniform", q_lens=(4, 4), kv_lens=(4, 4), plan_batch=2),
    replace(CASE, name="strided", strides="bhsd", plan_heads=1),
]


def cpu_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    inputs = make_inputs(case, dtype)
    q, k, v, grad_out, grad_lse = (x.cpu() for x in (*inputs[:3], inputs.grad_out, inputs.grad_lse))
    return q, k, v, inputs.plan.to("cpu"), grad_out, grad_lse


def arguments(plan: BlockPlan, scale: float = 0.5) -> tuple[Any, ...]:
    return (
        plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, *plan.transpose_csr(),
        plan.q_blocks.max_len, plan.kv_blocks.max_len, scale, "cpu",
    )  # fmt: skip


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_gradients_of_the_cpu_kernel_numerically(case: Case) -> None:
    q, k, v, plan, *_ = cpu_inputs(case)

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True)
        return out, lse[lse.detach().isfinite()]

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in (q, k, v)))


def test_values_may_have_another_head_dim() -> None:
    q, k, _, plan, *_ = cpu_inputs(CASE)
    v = torch.randn(2, 10, 1, 7, dtype=torch.float64, requires_grad=True)

    def f(v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, plan, backend="cpu")

    torch.testing.assert_close(f(v), block_sparse_attention(q, k, v, plan, backend="reference"))
    assert torch.autograd.gradcheck(f, v)


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    q, k, v, plan, grad_out, grad_lse = cpu_inputs(case, dtype)
    lists = arguments(plan)
    out, lse = custom_op._attention(q, k, v, *lists)
    torch.library.opcheck(
        torch.ops.openvsa.block_sparse_attention.default, (*(x.detach().requires_grad_() for x in (q, k, v)), *lists)
    )
    torch.library.opcheck(
        torch.ops.openvsa.block_sparse_attention.default, (q, k, v, *lists[:4], None, None, *lists[6:])
    )
    torch.library.opcheck(
        torch.ops.openvsa.block_sparse_attention_backward.default, (grad_out, grad_lse, q, k, v, out, lse, *lists)
    )


def test_without_gradients_no_transpose_is_made() -> None:
    q, k, v, plan, *_ = cpu_inputs(CASE)
    block_sparse_attention(q, k, v, plan, backend="cpu")
    with torch.no_grad():
        block_sparse_attention(q.requires_grad_(), k, v, plan, backend="cpu")
    assert "transpose_csr" not in plan._cache
    block_sparse_attention(q, k, v, plan, backend="cpu")
    assert "transpose_csr" in plan._cache


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_gradients_are_right_or_refused(backend: str) -> None:
    q, k, v, plan, *_ = cpu_inputs(CASE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, plan, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    if backend == "cpu":
        with pytest.raises(UnsupportedError, match=r"attention_backward has no derivative.*backend='reference'"):
            torch.autograd.grad(grad.square().sum(), leaves[2])
    else:
        assert torch.autograd.grad(grad.square().sum(), leaves[2])[0].abs().max() > 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    q, k, v, plan, grad_out, _ = cpu_inputs(CASE)
    everything = [x.detach().requires_grad_() for x in (q, k, v)]
    full = torch.autograd.grad(block_sparse_attention(*everything, plan, backend="cpu"), everything, grad_out)
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
    out = block_sparse_attention(*some, plan, backend="cpu")
    for i, grad in zip(wanted, torch.autograd.grad(out, [some[i] for i in wanted], grad_out), strict=True):
        assert torch.equal(grad, full[i])


# Inductor writes C++; where there is no compiler, the graph itself is still checked.
COMPILED = [("cpu", "aot_eager"), ("reference", "aot_eager"), *([("cpu", "inductor")] if shutil.which("g++") else [])]


@pytest.mark.parametrize(("backend", "compiler"), COMPILED)
def test_compiles_in_one_graph(backend: str, compiler: str) -> None:
    q, k, v, plan, grad_out, grad_lse = cpu_inputs(CASE, torch.float32)

    def f(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q * 2, k, v, plan, backend=backend, return_lse=True)
        return out * 3, lse

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = run(*inputs, plan)
        results.append((out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_plan_can_be_made_inside_a_compiled_function() -> None:
    lens = (4, 4, 2)
    q, k, v = (torch.randn(1, 10, 2, 4) for _ in range(3))
    q.requires_grad_()
    blocks = BlockPlan.dense(offsets(lens), offsets(lens)).q_blocks

    def f(q: Tensor, mask: Tensor) -> Tensor:
        plan = BlockPlan.from_block_mask(mask, blocks, blocks)
        return block_sparse_attention(q, k, v, plan, backend="cpu")

    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()[None, None]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for some_mask in (mask, mask.mT):
        torch.testing.assert_close(compiled(q, some_mask), f(q, some_mask))
        (grad,) = torch.autograd.grad(compiled(q, some_mask).sum(), q)
        torch.testing.assert_close(grad, torch.autograd.grad(f(q, some_mask).sum(), q)[0])
