"""The op as torch.library sees it: a forward and a backward custom op, with fakes and autograd.

The kernels themselves are modules of `ops.backends`; they are imported when first used and named by a string, because a
custom op takes only tensors and plain values. A module has `forward`, and either `backward` or its two halves,
`backward_q` and `backward_kv` (with `row_terms`, what the first leaves for the second). Halves need less memory: the
output, which the first alone reads, is given back before there are gradients of k and v.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from openvsa.ops.plan_tensors import PlanTensors
from openvsa.plan import BlockPlan
from openvsa.torch_op import torch_op

__all__ = ["run_kernel"]


def run_kernel(kernel: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Run the kernel module named `kernel`: out [B, Sq, H, Dv] and lse [B, H, Sq], differentiable."""
    starts = readers = None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        starts, readers = plan.transpose_csr()
    return _attention(
        q, k, v, plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, starts, readers,
        plan.q_blocks.max_len, plan.kv_blocks.max_len, scale, kernel,
    )  # fmt: skip


@cache
def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"openvsa.ops.backends.{name}")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_starts: Tensor | None,
    q_indices: Tensor | None,
    max_q_block: int,
    max_kv_block: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    plan = PlanTensors(q_offsets, kv_offsets, kv_num_blocks, kv_indices, q_starts, q_indices, max_q_block, max_kv_block)
    return _kernel(kernel).forward(q, k, v, plan, scale)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _d = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, q_len, heads, v.shape[-1]), q.new_empty(batch, heads, q_len, dtype=lse_dtype)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """For a backward pass, which may be started inside an autocast region. Most are not, and to enter such a context
    takes the host 10 microseconds."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_starts: Tensor,
    q_indices: Tensor,
    max_q_block: int,
    max_kv_block: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = PlanTensors(q_offsets, kv_offsets, kv_num_blocks, kv_indices, q_starts, q_indices, max_q_block, max_kv_block)
    with _without_autocast(q.device.type):
        return _kernel(kernel).backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_backward = torch_op("block_sparse_attention_backward", _backward, _fake_backward)


def _backward_q(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_offsets: Tensor, kv_offsets: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_starts: Tensor,
    q_indices: Tensor, max_q_block: int, max_kv_block: int, scale: float, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = PlanTensors(q_offsets, kv_offsets, kv_num_blocks, kv_indices, q_starts, q_indices, max_q_block, max_kv_block)
    with _without_autocast(q.device.type):
        return _kernel(kernel).backward_q(grad_out, grad_lse, q, k, v, out, lse, plan, scale)


def _fake_backward_q(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *plan, _scale, kernel = rest
    return q.new_empty(q.shape), _kernel(kernel).row_terms(q, PlanTensors(*plan))


_attention_backward_q = torch_op("block_sparse_attention_backward_q", _backward_q, _fake_backward_q)


def _backward_kv(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, row_terms: Tensor,
    q_offsets: Tensor, kv_offsets: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_starts: Tensor,
    q_indices: Tensor, max_q_block: int, max_kv_block: int, scale: float, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = PlanTensors(q_offsets, kv_offsets, kv_num_blocks, kv_indices, q_starts, q_indices, max_q_block, max_kv_block)
    with _without_autocast(q.device.type):
        return _kernel(kernel).backward_kv(grad_out, q, k, v, lse, row_terms, plan, scale)


def _fake_backward_kv(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


_attention_backward_kv = torch_op("block_sparse_attention_backward_kv", _backward_kv, _fake_backward_kv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.settings = inputs[9:]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, *lists, out, lse = ctx.saved_tensors
    # Of a graph that is walked once, nobody else holds them now. (torch's own backward of compiled code does this too.)
    ctx.maybe_clear_saved_tensors()
    rest = *lists, *ctx.settings
    if hasattr(_kernel(ctx.settings[-1]), "backward"):
        grads = _attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest)
    else:
        dq, terms = _attention_backward_q(grad_out, grad_lse, q, k, v, out, lse, *rest)
        del out
        grads = dq, *_attention_backward_kv(grad_out, q, k, v, lse, terms, *rest)
    return *grads, *(None,) * 10


_attention = torch_op("block_sparse_attention", _forward, _fake_forward, save=_save, differentiate=_differentiate)
