"""What a problem is, and what a backend says it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.config import machine_fact
from openvsa.plan import BlockPlan

__all__ = ["Backend", "Problem", "capability_of"]

Run = Callable[[Tensor, Tensor, Tensor, BlockPlan, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """What a call asks for, in host values.

    `uniform` says that all blocks but the last have one length; `capability` is that of an NVIDIA GPU, None elsewhere;
    `deterministic` is torch's mode of that name (torch.use_deterministic_algorithms).
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    batch: int
    num_heads: int
    num_kv_heads: int
    q_tokens: int
    kv_tokens: int
    max_q_block: int
    max_kv_block: int
    uniform: bool
    needs_grad: bool
    deterministic: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Problem:
        """The problem of a call with q [B, Sq, H, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv]."""
        return cls(
            device_type=q.device.type,
            capability=capability_of(q.device),
            dtype=q.dtype,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            batch=q.shape[0],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            q_tokens=plan.q_blocks.num_tokens,
            kv_tokens=plan.kv_blocks.num_tokens,
            max_q_block=plan.q_blocks.max_len,
            max_kv_block=plan.kv_blocks.max_len,
            uniform=plan.q_blocks.uniform_len is not None and plan.kv_blocks.uniform_len is not None,
            needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


@dataclass(frozen=True)
class Backend:
    """A way to run the op: its limits as data, and how to run it.

    `available` says why it cannot run on this machine at all (a missing package, say), as a list that is empty if
    it can; `extra_reasons` covers what plain limits cannot express; `auto_reasons` says why "auto" does not take it
    although it can run. `None` in a limit means no limit. `deterministic` promises the same bits in every run, of
    gradients too.
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
    deterministic: bool = True
    available: Callable[[str], list[str]] = lambda device_type: []
    extra_reasons: Callable[[Problem], list[str]] = lambda problem: []
    auto_reasons: Callable[[Problem], list[str]] = lambda problem: []

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
        if not self.deterministic and problem.deterministic and problem.needs_grad:
            reasons.append("its gradients differ in the last bits from run to run, and torch is set to deterministic")
        return reasons + self.extra_reasons(problem)


@machine_fact
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
