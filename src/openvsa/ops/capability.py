"""What a problem is, and what a backend says it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.plan import BlockPlan

__all__ = ["Backend", "Problem"]

Run = Callable[[Tensor, Tensor, Tensor, BlockPlan, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """What a call asks for, in host values. `uniform` says that all blocks but the last have one length."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    num_heads: int
    num_kv_heads: int
    max_q_block: int
    max_kv_block: int
    uniform: bool
    needs_grad: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Problem:
        """The problem of a call with q [B, Sq, H, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv]."""
        return cls(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            max_q_block=plan.q_blocks.max_len,
            max_kv_block=plan.kv_blocks.max_len,
            uniform=plan.q_blocks.uniform_len is not None and plan.kv_blocks.uniform_len is not None,
            needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        )


@dataclass(frozen=True)
class Backend:
    """A way to run the op: its limits as data, and how to run it.

    `available` says why it cannot run on this machine at all (a missing package, say), as a list that is empty if
    it can; `extra_reasons` covers what plain limits cannot express. `None` in a limit means no limit.
    """

    name: str
    summary: str
    run: Run
    dtypes: tuple[torch.dtype, ...]
    device_types: tuple[str, ...] | None = None
    head_dim: tuple[int, int] | None = None
    max_block: int | None = None
    ragged: bool = True
    head_dim_v_differs: bool = True
    available: Callable[[str], list[str]] = lambda device_type: []
    extra_reasons: Callable[[Problem], list[str]] = lambda problem: []

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot run `problem` here; empty if it can."""
        reasons = []
        if self.device_types is not None and problem.device_type not in self.device_types:
            reasons.append(f"runs on {' and '.join(self.device_types)} tensors, not on {problem.device_type}")
        else:
            reasons += self.available(problem.device_type)
        if problem.dtype not in self.dtypes:
            reasons.append(f"takes {_names(self.dtypes)}, not {_names((problem.dtype,))}")
        if self.head_dim is not None:
            low, high = self.head_dim
            if not low <= problem.head_dim <= high:
                reasons.append(f"takes head_dim {low} to {high}, not {problem.head_dim}")
        if not self.head_dim_v_differs and problem.head_dim != problem.head_dim_v:
            reasons.append(f"needs v to have the head_dim of q, {problem.head_dim}, not {problem.head_dim_v}")
        longest = max(problem.max_q_block, problem.max_kv_block)
        if self.max_block is not None and longest > self.max_block:
            reasons.append(f"takes blocks of at most {self.max_block} tokens, not {longest}")
        if not self.ragged and not problem.uniform:
            reasons.append("needs blocks of one length (the last may be shorter)")
        return reasons + self.extra_reasons(problem)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
