"""Dense attention and other people's sparse kernels, each a few lines around its own API.

An entry declares what it cannot run. What it declares and then fails at is recorded as its reason, not hidden.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openvsa.bench.cases import Case
from openvsa.bench.contenders import Attend, Contender
from openvsa.ops.capability import Problem
from openvsa.plan import BlockPlan

__all__ = ["PEERS"]

FA4 = "flash_attn.cute"
_FA4_SPARSITY = "flash_attn.cute.block_sparsity"
_FASTVIDEO = "fastvideo_kernel.block_sparse_attn"


@cache
def missing(*modules: str) -> tuple[str, ...]:
    """Why these modules cannot be imported here, in words."""
    found = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a compiled extension that does not load raises anything
            said = " ".join(str(error).split())[:200]
            found.append(f"{module} cannot be imported ({type(error).__name__}: {said})")
    return tuple(found)


def _on_cuda(problem: Problem) -> list[str]:
    return [] if problem.device_type == "cuda" else [f"runs on a CUDA device, not on {problem.device_type}"]


def _halves(problem: Problem) -> list[str]:
    halves = (torch.bfloat16, torch.float16)
    return [] if problem.dtype in halves else [f"takes bfloat16 and float16, not {problem.dtype}"]


# -- dense ------------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Callable[[BlockPlan | None, Case], Attend]:
    def prepare(plan: BlockPlan | None, case: Case) -> Attend:
        grouped = case.key_heads != case.heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

        return attend

    return prepare


def _cudnn_reasons(problem: Problem, case: Case) -> list[str]:
    return _on_cuda(problem) + _halves(problem)


def _flash_reasons(problem: Problem, case: Case) -> list[str]:
    return _halves(problem) if problem.device_type == "cuda" else []


def _fa4_reasons(problem: Problem, case: Case) -> list[str]:
    return (_on_cuda(problem) or list(missing(FA4))) + _halves(problem)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _prepare_fa4(plan: BlockPlan | None, case: Case) -> Attend:
    attention = importlib.import_module(FA4).flash_attn_func
    return lambda q, k, v: _first(attention(q, k, v))


# -- sparse -----------------------------------------------------------------------------------------------------------


def _equal_blocks(problem: Problem) -> list[str]:
    return [] if problem.uniform else ["needs blocks of one length"]


def _fa4_sparse_reasons(problem: Problem, case: Case) -> list[str]:
    reasons = (_on_cuda(problem) or list(missing(FA4, _FA4_SPARSITY))) + _halves(problem) + _equal_blocks(problem)
    if problem.max_q_block % 64 or problem.max_kv_block not in (64, 128):
        reasons.append(f"needs query blocks of a multiple of 64 and key blocks of 64 or 128, not {case.blocks}")
    # Without sparse lists for it the backward pass would walk every tile.
    if problem.needs_grad and problem.max_kv_block != 128:
        reasons.append(f"its backward pass needs key blocks of 128, not {problem.max_kv_block}")
    return reasons


def _prepare_fa4_sparse(plan: BlockPlan | None, case: Case) -> Attend:
    assert plan is not None
    attention = importlib.import_module(FA4).flash_attn_func
    lists = importlib.import_module(_FA4_SPARSITY).BlockSparseTensorsTorch
    size = (plan.q_blocks.max_len, plan.kv_blocks.max_len)

    def full_blocks(direction: BlockPlan) -> Any:
        counts, indices = direction.kv_num_blocks, direction.kv_indices
        return lists(torch.zeros_like(counts), torch.zeros_like(indices), counts, indices, block_size=size)

    forward, backward = full_blocks(plan), full_blocks(plan.transpose())
    return lambda q, k, v: _first(attention(q, k, v, block_sparse_tensors=forward, block_sparse_tensors_bwd=backward))


def _fastvideo_reasons(problem: Problem, case: Case) -> list[str]:
    reasons = (_on_cuda(problem) or list(missing(_FASTVIDEO))) + _halves(problem)
    full = problem.uniform and problem.max_q_block == problem.max_kv_block == 64 and not case.layout.num_tokens % 64
    if not full:
        reasons.append(f"needs every block to have 64 tokens (others are padded by its caller), not {case.blocks}")
    if problem.num_heads != problem.num_kv_heads:
        reasons.append("has no grouped heads")
    return reasons


def _prepare_fastvideo(plan: BlockPlan | None, case: Case) -> Attend:
    assert plan is not None
    attention = importlib.import_module(_FASTVIDEO).block_sparse_attn_triton
    num_kv = plan.kv_blocks.num_blocks
    shape = (case.batch, case.heads, plan.q_blocks.num_blocks)
    counts = plan.kv_num_blocks.expand(shape).contiguous()
    indices = torch.nn.functional.pad(plan.kv_indices, (0, num_kv - plan.kv_indices.shape[-1]))
    indices = indices.expand(*shape, num_kv).contiguous()
    sizes = plan.kv_blocks.lens_on(plan.device)
    return lambda q, k, v: _first(attention(q, k, v, indices, counts, sizes))


def _flex_reasons(problem: Problem, case: Case) -> list[str]:
    reasons = _on_cuda(problem) + _equal_blocks(problem)
    # Inductor's kernels work in up to 128 x 128 and, on Hopper backward, in nothing smaller.
    if problem.max_q_block % 128 or problem.max_kv_block % 128:
        reasons.append(f"needs blocks of 128 tokens or a multiple, not {case.blocks}")
    return reasons


def _prepare_flex(plan: BlockPlan | None, case: Case) -> Attend:
    assert plan is not None
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    # A backward pass that gives its buffers away can run only once, and is timed many times. PyTorch asks for this both
    # when it compiles and when it runs the pass.
    config.donated_buffer = False
    mask, grouped = plan.to_flex_block_mask(), case.key_heads != case.heads
    compiled = torch.compile(flex_attention, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)  # pyright: ignore[reportReturnType]


PEERS = (
    Contender(
        "dense-cudnn", "dense", "cuDNN through scaled_dot_product_attention", _cudnn_reasons,
        _sdpa(SDPBackend.CUDNN_ATTENTION), heads_first=True,
    ),
    Contender(
        "dense-flash", "dense", "FlashAttention-2 (on a CPU: PyTorch's) through scaled_dot_product_attention",
        _flash_reasons, _sdpa(SDPBackend.FLASH_ATTENTION), heads_first=True,
    ),
    Contender("dense-fa4", "dense", "FlashAttention-4, flash_attn_func", _fa4_reasons, _prepare_fa4),
    Contender("fa4-sparse", "peer", "FlashAttention-4 with block lists", _fa4_sparse_reasons, _prepare_fa4_sparse),
    Contender(
        "fastvideo", "peer", "FastVideo's Triton kernel, block_sparse_attn_triton", _fastvideo_reasons,
        _prepare_fastvideo, heads_first=True,
    ),
    Contender(
        "flexattention", "peer", "PyTorch's FlexAttention, its BlockMask made beforehand", _flex_reasons,
        _prepare_flex, heads_first=True, on_request=True,
    ),
)  # fmt: skip
