"""Block-sparse attention on the CPU that does only the planned work.

The kept key blocks of a few query blocks at a time are gathered into one dense operand, and batched matrix products
do the rest. Extra memory is one fp32 copy of one head's keys and values plus a chunk whose size does not depend on
the sequence (unless a single row is longer than it). What a chunk needs, and one head's output, is kept for the next
call: memory fresh from the system costs a tenth of the time. Arithmetic is in fp32, or fp64 for fp64 input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from openvsa.ops.plan_tensors import PlanTensors

__all__ = ["backward", "forward"]

# Scores per chunk and thread: with its gathered keys or values a chunk then stays within a core's share of cache.
CHUNK_SCORES = 1 << 18


def forward(q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] in the dtype of q and lse [B, H, Sq] in that of the arithmetic, for q [B, Sq, H, D],
    k [B, Skv, Hkv, D] and v [B, Skv, Hkv, Dv]."""
    batch, q_len, heads, _ = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_slots, kv_slots = _Slots.of(plan.q_offsets, plan.max_q_block), _Slots.of(plan.kv_offsets, plan.max_kv_block)
    out = q.new_empty(batch, q_len, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, q_len, dtype=dtype)

    room = _Room.of(dtype)
    for b, kv_head in product(range(batch), range(kv_heads)):
        k_blocks = kv_slots.pad(k[b, :, kv_head].to(dtype))
        v_blocks = kv_slots.pad(v[b, :, kv_head].to(dtype))
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            q_blocks = q_slots.pad(q[b, :, head].to(dtype) * scale)
            out_blocks = room.take("out", *q_blocks.shape[:2], v.shape[-1]).zero_()
            lse_blocks = room.take("lse", *q_blocks.shape[:2]).fill_(float("-inf"))
            for chunk in _chunks(plan, kv_slots, b, head):
                p = chunk.scores(q_blocks[chunk.rows], k_blocks, room)
                top = p.amax(-1)
                torch.softmax(p, -1, out=p)
                # The largest probability is exp(top - lse).
                lse_blocks[chunk.rows] = top - p.amax(-1).log()
                out_blocks[chunk.rows] = room.bmm("rows", p, chunk.gather(v_blocks, room))
            out[b, :, head] = q_slots.unpad(out_blocks)
            lse[b, head] = q_slots.unpad(lse_blocks)
    return out, lse


def backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for the gradients do [B, Sq, H, Dv] of out and dlse [B, H, Sq] of lse."""
    batch, _, heads, _ = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_slots, kv_slots = _Slots.of(plan.q_offsets, plan.max_q_block), _Slots.of(plan.kv_offsets, plan.max_kv_block)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))

    room = _Room.of(dtype)
    for b, kv_head in product(range(batch), range(kv_heads)):
        k_blocks = kv_slots.pad(k[b, :, kv_head].to(dtype))
        v_blocks = kv_slots.pad(v[b, :, kv_head].to(dtype))
        dk_blocks, dv_blocks = torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            do_head = do[b, :, head].to(dtype).contiguous()
            q_blocks = q_slots.pad(q[b, :, head].to(dtype) * scale)
            do_blocks = q_slots.pad(do_head)
            # d lse/d s = p, so its gradient joins the row term of the softmax's.
            delta = (do_head * out[b, :, head]).sum(-1) - dlse[b, head]
            lse_blocks, delta_blocks = q_slots.pad(lse[b, head].to(dtype)), q_slots.pad(delta)
            dq_blocks = torch.zeros_like(q_blocks)
            for chunk in _chunks(plan, kv_slots, b, head):
                q_rows, do_rows = q_blocks[chunk.rows], do_blocks[chunk.rows]
                p = chunk.scores(q_rows, k_blocks, room)
                p.sub_(lse_blocks[chunk.rows].unsqueeze(-1)).exp_()
                chunk.scatter_add(dv_blocks, room.bmm("gradients", p.transpose(1, 2), do_rows))
                values = chunk.gather(v_blocks, room)
                ds = room.bmm("ds", do_rows, values.transpose(1, 2))
                ds.sub_(delta_blocks[chunk.rows].unsqueeze(-1)).mul_(p)
                dq_blocks[chunk.rows] = torch.bmm(ds, chunk.gather(k_blocks, room))
                chunk.scatter_add(dk_blocks, room.bmm("gradients", ds.transpose(1, 2), q_rows))
            dq[b, :, head] = q_slots.unpad(dq_blocks) * scale
        dk[b, :, kv_head] = kv_slots.unpad(dk_blocks)
        dv[b, :, kv_head] = kv_slots.unpad(dv_blocks)
    return dq, dk, dv


class _Slots(NamedTuple):
    """Ragged blocks as a table of equal ones: `tokens` are the slots [S] that real tokens fill."""

    num_blocks: int
    width: int
    lens: Tensor
    tokens: Tensor | None

    @classmethod
    def of(cls, offsets: Tensor, width: int) -> _Slots:
        lens = offsets.diff().long()
        if bool((lens == width).all()):
            return cls(lens.numel(), width, lens, None)
        block = torch.repeat_interleave(lens)
        tokens = torch.arange(block.numel(), device="cpu") - offsets.long()[block] + block * width
        return cls(lens.numel(), width, lens, tokens)

    def pad(self, x: Tensor) -> Tensor:
        """[S, ...] to [N, width, ...], zeros in unfilled slots."""
        if self.tokens is None:
            return x.contiguous().unflatten(0, (self.num_blocks, self.width))
        table = x.new_zeros(self.num_blocks * self.width, *x.shape[1:])
        table[self.tokens] = x
        return table.unflatten(0, (self.num_blocks, self.width))

    def unpad(self, blocks: Tensor) -> Tensor:
        """[N, width, ...] to [S, ...]."""
        flat = blocks.flatten(0, 1)
        return flat if self.tokens is None else flat[self.tokens]


class _Chunk(NamedTuple):
    """Some query blocks, `rows` [n], and the key blocks each reads, `picks` [n, K]; `hidden` marks columns that hold
    no planned token."""

    rows: Tensor | slice
    picks: Tensor
    hidden: Tensor | None

    def gather(self, blocks: Tensor, room: _Room) -> Tensor:
        """[NK, width, D] to [n, K * width, D], in room that the next gather takes again."""
        found = room.take("gathered", self.picks.numel(), blocks.shape[1] * blocks.shape[2])
        torch.index_select(blocks.flatten(1), 0, self.picks.flatten(), out=found)
        return found.view(self.picks.shape[0], -1, blocks.shape[-1])

    def scores(self, q_rows: Tensor, k_blocks: Tensor, room: _Room) -> Tensor:
        """q_rows [n, M, D] times the gathered keys: [n, M, K * width], -inf in columns that hold no planned token."""
        p = room.bmm("scores", q_rows, self.gather(k_blocks, room).transpose(1, 2))
        if self.hidden is not None:
            p.masked_fill_(self.hidden[:, None, :], float("-inf"))
        return p

    def scatter_add(self, blocks: Tensor, x: Tensor) -> None:
        """Add [n, K * width, D] back into [NK, width, D]."""
        blocks.flatten(1).index_add_(0, self.picks.flatten(), x.view(self.picks.numel(), -1))


class _Room:
    """Memory for a chunk's large operands, taken again by every chunk and call so that it stays in cache."""

    _of_thread = threading.local()

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._held: dict[str, Tensor] = {}

    @classmethod
    def of(cls, dtype: torch.dtype) -> _Room:
        """The room of this thread."""
        rooms = cls._of_thread.__dict__
        return rooms.setdefault(str(dtype), cls(dtype))

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, with the values its last use left there."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            # Tensors born in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                held = self._held[name] = torch.empty(size, dtype=self.dtype, device="cpu")
        return held[:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a [n, M, K] @ b [n, K, N]."""
        return torch.bmm(a, b, out=self.take(name, a.shape[0], a.shape[1], b.shape[2]))


def _chunks(plan: PlanTensors, kv_slots: _Slots, b: int, head: int) -> Iterator[_Chunk]:
    """Query blocks that read something, a few at a time, those with equally long lists together."""
    entry = min(b, plan.kv_num_blocks.shape[0] - 1), min(head, plan.kv_num_blocks.shape[1] - 1)
    counts, indices = plan.kv_num_blocks[entry], plan.kv_indices[entry]
    order = None
    if bool((counts[1:] < counts[:-1]).any()):
        counts, order = counts.sort(stable=True)
    empty = int((counts == 0).sum())
    counts = counts.tolist()
    budget = CHUNK_SCORES * torch.get_num_threads()
    start = empty
    while start < len(counts):
        stop = start + 1
        while stop < len(counts) and (stop + 1 - start) * counts[stop] * plan.max_q_block * kv_slots.width <= budget:
            stop += 1
        # A slice where the order allows it: views of the rows instead of copies.
        rows, longest = slice(start, stop) if order is None else order[start:stop], counts[stop - 1]
        picks = indices[rows, :longest].long()
        hidden = None
        if counts[start] < longest:
            past = torch.arange(longest, device="cpu") >= torch.tensor(counts[start:stop], device="cpu")[:, None]
            # Filled up with what the row reads anyway: 0 times the NaN of an unread block would be NaN.
            picks = torch.where(past, picks[:, :1], picks)
            hidden = past[..., None].expand(-1, -1, kv_slots.width)
        if kv_slots.tokens is not None:
            beyond = torch.arange(kv_slots.width, device="cpu") >= kv_slots.lens[picks][..., None]
            hidden = beyond if hidden is None else hidden | beyond
        yield _Chunk(rows, picks, None if hidden is None else hidden.flatten(1))
        start = stop
