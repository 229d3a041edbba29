"""The same attention over larger or smaller blocks, in index form `(kv_num_blocks, kv_indices)`.

None of these functions waits for the device or makes a table as wide as all key blocks, unless the lists are that wide.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from openvsa.errors import PlanError
from openvsa.layout import BlockOffsets
from openvsa.layout.keep import values_known

__all__ = ["coarsen_lists", "grouped", "pieces", "refine_lists"]


def grouped(blocks: BlockOffsets, size: int) -> BlockOffsets:
    """Groups of `size` neighbouring blocks as one block each; the last group may hold fewer."""
    lens = blocks.lens
    return BlockOffsets([sum(lens[i : i + size]) for i in range(0, len(lens), size)])


def pieces(coarse: BlockOffsets, fine: BlockOffsets) -> list[int]:
    """How many blocks of `fine` make up each block of `coarse`.

    Raises:
        PlanError: a block of `fine` lies across a border of `coarse`, or the two hold different token counts.
    """
    borders = set(accumulate(fine.lens))
    missing = [edge for edge in accumulate(coarse.lens) if edge not in borders]
    if missing or coarse.num_tokens != fine.num_tokens:
        raise PlanError(
            f"the blocks to split into must end wherever a block of the plan ends; {fine} has no border at token "
            f"{missing[0] if missing else coarse.num_tokens} of {coarse}"
        )
    ends = {edge: i + 1 for i, edge in enumerate(accumulate(fine.lens))}
    cuts = [0, *(ends[edge] for edge in accumulate(coarse.lens))]
    return [b - a for a, b in pairwise(cuts)]


def coarsen_lists(counts: Tensor, indices: Tensor, num_kv: int, q: int, kv: int) -> tuple[Tensor, Tensor]:
    """Lists over groups of `q` query blocks and `kv` key blocks: all groups of key blocks that any row of a
    group reads. Ascending, zeros past the count; at most q * K wide."""
    num_groups = -(-num_kv // kv)
    short = -counts.shape[-1] % q
    planned = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    group = torch.where(planned, indices // kv, num_groups)
    group = torch.nn.functional.pad(group, (0, 0, 0, short), value=num_groups)
    group = group.unflatten(-2, (-1, q)).flatten(-2).sort(dim=-1).values
    repeated = torch.nn.functional.pad(group[..., 1:] == group[..., :-1], (1, 0))
    group = group.masked_fill(repeated, num_groups).sort(dim=-1).values
    return _trimmed((group < num_groups).sum(-1, dtype=torch.int32), group.int(), num_groups)


def refine_lists(counts: Tensor, indices: Tensor, q_pieces: list[int], kv_pieces: list[int]) -> tuple[Tensor, Tensor]:
    """Lists in which query block i has become q_pieces[i] rows, and key block j kv_pieces[j] entries of each list."""
    device, width = indices.device, indices.shape[-1]
    parts = torch.tensor(kv_pieces, device="cpu").to(device, non_blocking=True)
    first = torch.tensor([0, *accumulate(kv_pieces)], device="cpu").to(device, non_blocking=True)
    rows = torch.repeat_interleave(torch.tensor(q_pieces, device="cpu"), output_size=sum(q_pieces))
    rows = rows.to(device, non_blocking=True)

    planned = torch.arange(width, device=device) < counts[..., None]
    old = indices.masked_fill(~planned, 0).long()
    ends = (parts[old] * planned).cumsum(-1)
    counts = ends[..., -1]
    slot = torch.arange(min(width * max(kv_pieces), sum(kv_pieces)), device=device)
    # Slot s of a new list is piece s - start of the entry whose pieces are those from start on.
    entry = torch.searchsorted(ends, slot.expand(*ends.shape[:-1], -1).contiguous(), right=True).clamp(max=width - 1)
    start = ends - parts[old]
    new = first[old.gather(-1, entry)] + slot - start.gather(-1, entry)
    new = new.masked_fill(slot >= counts[..., None], 0)
    return _trimmed(counts.int()[..., rows], new.int()[..., rows, :], sum(kv_pieces))


def _trimmed(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """No wider than needed, as far as the host knows the counts; zeros past the count."""
    width = min(indices.shape[-1], num_kv)
    if counts.numel() and values_known(counts):
        width = min(width, max(int(counts.max()), 1))
    indices = indices[..., :width]
    past = torch.arange(width, device=indices.device) >= counts[..., None]
    return counts, indices.masked_fill(past, 0)
