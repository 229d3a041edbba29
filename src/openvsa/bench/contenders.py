"""Who is measured: the package's own backends, dense attention, other people's kernels, and a matmul as the ceiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from openvsa.bench.cases import Case
from openvsa.errors import OpenVSAError
from openvsa.ops import block_sparse_attention
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.registry import backends
from openvsa.plan import BlockPlan

__all__ = ["Attend", "Contender", "contenders", "default_contenders", "find_contenders"]

Attend = Callable[..., Tensor]  # of q, k and v; the whole op also takes a branch weight

# Registered, but measured only when named: the oracle is no competitor, and FlexAttention compiles for long.
_ON_REQUEST = ("reference", "flex")


@dataclass(frozen=True)
class Contender:
    """Something that attends.

    kind: "openvsa", "dense" (reads everything), "peer" (other people's sparse kernels).
    reasons: why it cannot run a case with this plan here, with or without gradients; empty if it can. Imports what it
        needs to find out.
    prepare: makes the function to be timed from a plan (None for dense). All conversions of the plan are done here.
    heads_first: it takes and gives [B, H, S, D] instead of [B, S, H, D].
    on_request: measured only when named, for it compiles for long.
    """

    name: str
    kind: Literal["openvsa", "dense", "peer"]
    summary: str
    reasons: Callable[[Problem, Case], list[str]]
    prepare: Callable[[BlockPlan | None, Case], Attend]
    heads_first: bool = False
    on_request: bool = False


def contenders() -> dict[str, Contender]:
    """All of them by name, in the order in which results list them."""
    from openvsa.bench.peers import PEERS

    return {entry.name: entry for entry in (*map(_of_backend, backends()), *PEERS)}


def default_contenders(device_type: str) -> list[str]:
    """The names measured when none are given: all that can run on this type of device and do not compile for long."""
    own = {b.name for b in backends() if b.device_types is not None and device_type not in b.device_types}
    return [c.name for c in contenders().values() if not c.on_request and c.name not in own]


def find_contenders(names: list[str] | None, device_type: str) -> list[Contender]:
    """Those of these names, or the default ones.

    Raises:
        OpenVSAError: there is no contender of a name.
    """
    known = contenders()
    for name in names or ():
        if name not in known:
            raise OpenVSAError(f"there is no contender {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names or default_contenders(device_type)]


def _of_backend(backend: Backend) -> Contender:
    def prepare(plan: BlockPlan | None, case: Case) -> Attend:
        assert plan is not None
        return lambda q, k, v: block_sparse_attention(q, k, v, plan, backend=backend.name)

    return Contender(
        backend.name, "openvsa", backend.summary, lambda problem, case: backend.unsupported_reasons(problem), prepare,
        on_request=backend.name in _ON_REQUEST,
    )  # fmt: skip
