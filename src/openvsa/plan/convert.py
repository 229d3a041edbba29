"""The forms a plan takes elsewhere: dense mask, compressed rows, FlexAttention, a file.

These functions speak plain tensors, the index form `(kv_num_blocks, kv_indices)` first. None of them waits for the
device unless its result is a host value.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openvsa.errors import PlanError, require
from openvsa.layout import BlockOffsets
from openvsa.layout.device import kernels_on
from openvsa.layout.keep import values_known
from openvsa.torch_op import torch_op

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FILE_FORMAT = "openvsa.BlockPlan/1"


def mask_to_lists(mask: Tensor, max_blocks: int | None) -> tuple[Tensor, Tensor]:
    """bool [..., NQ, NK] to counts [..., NQ] and ascending indices [..., NQ, K]."""
    counts = mask.sum(-1, dtype=torch.int32)
    width = mask.shape[-1] if max_blocks is None else min(max_blocks, mask.shape[-1])
    if values_known(mask):
        longest = int(counts.max()) if counts.numel() else 0
        if max_blocks is not None and longest > width:
            raise PlanError(f"max_blocks is {max_blocks}, but a row of the mask has {longest} blocks")
        width = longest if max_blocks is None else width
    order = mask.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    # A broken promise about max_blocks must not make kernels read beyond the list.
    counts = counts if max_blocks is None else counts.clamp(max=width)
    return counts, order[..., : max(width, 1)].int()


def lists_to_mask(counts: Tensor, indices: Tensor, num_kv: int) -> Tensor:
    """Index form to bool [..., NQ, NK]."""
    planned = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    slots = torch.where(planned, indices, num_kv).long()
    mask = torch.zeros(*counts.shape, num_kv + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, slots, True)[..., :num_kv]


def lists_to_csr(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Index form to starts [..., NQ + 1] and packed indices [..., NQ * K]."""
    _check_entries(indices)
    width = indices.shape[-1]
    planned = (torch.arange(width, device=indices.device) < counts[..., None]).flatten(-2)
    order = planned.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    starts = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    return starts, indices.flatten(-2).gather(-1, order)


def csr_to_lists(starts: Tensor, indices: Tensor, num_kv: int, max_blocks: int | None) -> tuple[Tensor, Tensor]:
    """Compressed rows to index form; K is `max_blocks`, else the longest row (CPU) or NK (elsewhere)."""
    counts = starts.diff(dim=-1).int()
    width = num_kv if max_blocks is None else max_blocks
    if counts.numel() and values_known(starts) and values_known(indices):
        _check_starts(starts, indices)
        longest = int(counts.max())
        if longest > width:
            raise PlanError(f"a row of the compressed form has {longest} blocks, but at most {width} are possible")
        width = longest if max_blocks is None else width
    counts = counts if max_blocks is None else counts.clamp(max=width)  # as above
    slot = torch.arange(max(width, 1), device=starts.device)
    if indices.shape[-1] == 0:
        return counts, torch.zeros(*counts.shape, 1, dtype=torch.int32, device=starts.device)
    at = (starts[..., :-1, None] + slot).clamp(max=indices.shape[-1] - 1).flatten(-2).long()
    rows = indices.gather(-1, at).unflatten(-1, (counts.shape[-1], slot.numel()))
    return counts, rows.masked_fill(slot >= counts[..., None], 0).int()


def _check_entries(indices: Tensor) -> None:
    num_q, width = indices.shape[-2:]
    if num_q * width >= 2**31:
        raise PlanError(
            f"compressed rows count the entries of a head in 32 bits, got {num_q} query blocks * K = {width}; make the "
            "lists shorter (max_blocks, a smaller budget) or the blocks larger"
        )


def _check_starts(starts: Tensor, indices: Tensor) -> None:
    if (starts[..., 0] != 0).any() or (starts.diff(dim=-1) < 0).any() or int(starts.max()) > indices.shape[-1]:
        raise PlanError(
            f"starts must begin at 0, never decrease, and stay within the {indices.shape[-1]} indices; "
            f"got a row {starts.reshape(-1, starts.shape[-1])[0].tolist()[:8]}..."
        )


def transpose_lists(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """The readers of each key block as compressed rows: starts [..., NK + 1], ascending readers [..., NQ * K].

    A stable sort of all entries by key block keeps the query blocks ascending within each, and needs no atomics. On a
    GPU kernels do it without a sort, through a table of NK x NQ bits.
    """
    _check_entries(indices)
    if kernels_on(indices.device):
        return _transpose_lists(counts, indices, num_kv)
    width = indices.shape[-1]
    planned = torch.arange(width, device=indices.device) < counts[..., None]
    key_block = torch.where(planned, indices, num_kv).flatten(-2)
    key_block, order = key_block.sort(dim=-1, stable=True)
    edges = torch.arange(num_kv + 1, device=indices.device, dtype=key_block.dtype)
    edges = edges.expand(*key_block.shape[:-1], -1).contiguous()
    starts = torch.searchsorted(key_block.contiguous(), edges, out_int32=True)
    return starts, (order // width).int()


def _transpose_lists_kernel(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    from openvsa.plan import kernels

    return kernels.transpose_lists(counts, indices, num_kv)


def _fake_transpose_lists(counts: Tensor, indices: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    num_q, width = indices.shape[-2:]
    return counts.new_empty((*counts.shape[:-1], num_kv + 1)), counts.new_empty((*counts.shape[:-1], num_q * width))


_transpose_lists = torch_op("transpose_lists", _transpose_lists_kernel, _fake_transpose_lists)


def lists_to_flex(counts: Tensor, indices: Tensor, q_blocks: BlockOffsets, kv_blocks: BlockOffsets) -> BlockMask:
    """Index form to FlexAttention; its index table must be NK wide."""
    from torch.nn.attention.flex_attention import BlockMask

    for name, blocks in (("query", q_blocks), ("key", kv_blocks)):
        if blocks.uniform_len is None:
            raise PlanError(
                f"FlexAttention needs {name} blocks of one length (the last may be shorter), got {blocks}; "
                "choose a tile that divides the lattice"
            )
    wide = torch.nn.functional.pad(indices, (0, kv_blocks.num_blocks - indices.shape[-1]))
    past = torch.arange(kv_blocks.num_blocks, device=counts.device) >= counts[..., None]
    sizes = (q_blocks.uniform_len or 1, kv_blocks.uniform_len or 1)
    return BlockMask.from_kv_blocks(
        counts,
        wide.masked_fill(past, 0),
        BLOCK_SIZE=sizes,
        seq_lengths=(q_blocks.num_tokens, kv_blocks.num_tokens),
    )


def flex_to_lists(block_mask: BlockMask) -> tuple[Tensor, Tensor, BlockOffsets, BlockOffsets]:
    """FlexAttention to index form."""
    from torch.nn.attention.flex_attention import noop_mask

    q_len, kv_len = block_mask.seq_lengths
    q_size, kv_size = block_mask.BLOCK_SIZE
    kv_blocks = _equal_blocks(kv_len, kv_size)
    counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
    full_counts, full_indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    if block_mask.mask_mod is not noop_mask and int(counts.sum()):
        raise PlanError(
            f"{int(counts.sum())} blocks of the BlockMask are partial (masked inside by its mask_mod); a BlockPlan "
            "holds whole blocks only: build the mask with from_kv_blocks, or choose a BLOCK_SIZE that fits it"
        )
    if full_counts is not None and full_indices is not None:
        num_kv = kv_blocks.num_blocks
        mask = lists_to_mask(full_counts, full_indices, num_kv) | lists_to_mask(counts, indices, num_kv)
        counts, indices = mask_to_lists(mask, None)
    else:
        longest = max(int(counts.max()), 1)
        counts, indices = counts.int(), indices[..., :longest].int()
        past = torch.arange(longest, device=counts.device) >= counts[..., None]
        indices = indices.masked_fill(past, kv_blocks.num_blocks).sort(dim=-1).values.masked_fill(past, 0)
    return counts, indices, _equal_blocks(q_len, q_size), kv_blocks


def _equal_blocks(tokens: int, size: int) -> BlockOffsets:
    return BlockOffsets([min(size, tokens - start) for start in range(0, tokens, size)])


def save_lists(
    path: str | PathLike[str], counts: Tensor, indices: Tensor, q_blocks: BlockOffsets, kv_blocks: BlockOffsets
) -> None:
    """Write a plan as safetensors, through a temporary file beside it."""
    require("numpy", extra="io")  # safetensors writes through it
    safetensors = require("safetensors.torch", extra="io")
    cpu = torch.device("cpu")
    tensors = {
        "kv_num_blocks": counts.cpu().contiguous(),
        "kv_indices": indices.cpu().contiguous(),
        "q_offsets": q_blocks.on(cpu),
        "kv_offsets": kv_blocks.on(cpu).clone(),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(safetensors.save(tensors, metadata={"format": FILE_FORMAT}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_lists(path: str | PathLike[str]) -> tuple[Tensor, Tensor, BlockOffsets, BlockOffsets]:
    """Read what `save_lists` wrote."""
    safetensors = require("safetensors", extra="io")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise PlanError(f"{path} is a safetensors file but not a plan of format {FILE_FORMAT}, got {metadata}")
            found = {name: file.get_tensor(name) for name in ("kv_num_blocks", "kv_indices", "q_offsets", "kv_offsets")}
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"cannot read a plan from {path}: {error}") from error
    return (
        found["kv_num_blocks"],
        found["kv_indices"],
        BlockOffsets.of(found["q_offsets"]),
        BlockOffsets.of(found["kv_offsets"]),
    )
