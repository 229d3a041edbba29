"""Counting what one layer has done."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.integrations.report import LayerReport
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan

__all__ = ["Clock", "Tally"]


class Clock:
    """The time from its making to `stop`; on a GPU told by events, which do not wait."""

    def __init__(self, on: Tensor) -> None:
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if on.device.type == "cuda":
            self.events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self.events[0].record()
        self._start, self._stop = time.perf_counter(), 0.0

    def stop(self) -> None:
        self._stop = time.perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Waits for the device."""
        if self.events:
            self.events[1].synchronize()
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        return self._stop - self._start


@dataclass
class Tally:
    """What one layer did: sums, so that it stays small however long the model serves. Sums of plans stay on the
    device, which nobody waits for until the report."""

    layer: int
    name: str
    layout: TileLayout
    calls: int = 0
    sparse_calls: int = 0
    requested: float | None = 0.0
    delivered: Tensor | float = 0.0
    executed: Tensor | float = 0.0
    seconds: float = 0.0
    why_dense: str = ""
    pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    def count_dense(self, why: str) -> None:
        self.calls += 1
        self.why_dense = why
        self.executed = self.executed + 1.0

    def count(self, plans: list[tuple[float, BlockPlan]], budget: Budget | tuple[Budget, ...]) -> None:
        """A call, by the plans of its samples, each with the share of them that it is for."""
        self.calls += 1
        self.sparse_calls += 1
        budgets = budget if isinstance(budget, tuple) else (budget,)
        shares = [one.keep_ratio for one in budgets]
        if self.requested is None or None in shares:
            self.requested = None
        else:
            self.requested += sum(share for share in shares if share is not None) / len(shares)
        for samples, plan in plans:
            delivered = plan.kv_num_blocks.mean(dtype=torch.float32) / plan.kv_blocks.num_blocks
            executed = delivered if _all_alike(plan) else _pairs_share(plan)
            # In fp32 the sums of a server that runs for long would stand still.
            self.delivered = self.delivered + samples * delivered.double()
            self.executed = self.executed + samples * executed.double()

    def time(self, clock: Clock) -> None:
        if clock.events:
            self.pending.append(clock.events)
            self.settle(wait=False)
        else:
            self.seconds += clock.seconds()

    def settle(self, *, wait: bool) -> None:
        """Add up the times of calls that the device has finished; of all calls if `wait`."""
        while self.pending and (wait or self.pending[0][1].query()):
            start, stop = self.pending.popleft()
            stop.synchronize()
            self.seconds += start.elapsed_time(stop) / 1e3

    def report(self) -> LayerReport:
        """Waits for the device."""
        self.settle(wait=True)
        sparse = self.sparse_calls
        requested = self.requested
        if requested is not None:
            requested = requested / sparse if sparse else 1.0
        return LayerReport(
            layer=self.layer,
            name=self.name,
            grid=self.layout.grid,
            tile=self.layout.tile,
            num_blocks=self.layout.num_blocks,
            requested_density=requested,
            delivered_density=float(self.delivered) / sparse if sparse else 1.0,
            executed_density=float(self.executed) / self.calls,
            calls=self.calls,
            sparse_calls=sparse,
            attention_seconds=self.seconds,
            why_dense=self.why_dense,
        )


def _all_alike(plan: BlockPlan) -> bool:
    """Whether all blocks are of one length: pairs of blocks then are pairs of tokens."""
    return all(blocks.max_len * blocks.num_blocks == blocks.num_tokens for blocks in (plan.q_blocks, plan.kv_blocks))


def _pairs_share(plan: BlockPlan) -> Tensor:
    """The share of all query-key pairs that a plan computes. Asked in every call, so it makes few tensors of the size
    of the lists, and those of 32 bits."""
    indices, counts = plan.kv_indices, plan.kv_num_blocks
    past = torch.arange(indices.shape[-1], device=plan.device) >= counts[..., None]
    lens = plan.kv_blocks.lens_on(plan.device).index_select(0, indices.masked_fill(past, 0).flatten())
    keys = lens.view(indices.shape).masked_fill_(past, 0).sum(-1, dtype=torch.float32)
    rows = plan.q_blocks.num_blocks / plan.q_blocks.num_tokens / plan.kv_blocks.num_tokens
    return (keys * plan.q_blocks.lens_on(plan.device)).mean() * rows
