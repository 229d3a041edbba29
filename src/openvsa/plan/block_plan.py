"""BlockPlan, the value that selectors make and kernels run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from openvsa.config import Budget
from openvsa.errors import PlanError
from openvsa.layout import BlockOffsets
from openvsa.layout.device import as_device
from openvsa.layout.keep import values_known
from openvsa.plan import convert
from openvsa.plan.coarsen import coarsen_lists, grouped, pieces, refine_lists
from openvsa.plan.rank import rank

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockPlan", "Offsets"]

Offsets = BlockOffsets | Tensor | Sequence[int]


@dataclass(frozen=True, eq=False, repr=False)
class BlockPlan:
    """Which key blocks each query block reads, per batch and head. Immutable; lives on one device.

    A plan broadcasts over batch or heads by having size 1 there. Query and key blocks are ragged: their lengths
    come from `q_blocks` and `kv_blocks`, which are host knowledge, so no method here that builds or transposes a
    plan waits for the device. Those that return Python numbers (`density`, `cost`, `repr`, `validate`, `save`) do.

    Args:
        kv_num_blocks: int32 [B|1, H|1, NQ], how many key blocks each query block reads; 0 is allowed.
        kv_indices: int32 [B|1, H|1, NQ, K], which ones, ascending; entries past the count are never read.
        q_blocks, kv_blocks: the blocks of the query and of the key sequence: a BlockOffsets, or offsets [NQ + 1]
            and [NK + 1] as a sequence or a CPU tensor (a tensor on a device costs one synchronisation).

    Raises:
        PlanError: a shape or dtype is wrong; on the CPU also a count or an index out of range or out of order (on
            other devices `validate` checks those).
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_blocks: BlockOffsets
    kv_blocks: BlockOffsets
    _cache: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "q_blocks", BlockOffsets.of(self.q_blocks))
        object.__setattr__(self, "kv_blocks", BlockOffsets.of(self.kv_blocks))
        counts, indices = self.kv_num_blocks, self.kv_indices
        _check_tensors(kv_num_blocks=counts, kv_indices=indices)
        if counts.dim() != 3 or indices.dim() != 4 or indices.shape[:3] != counts.shape:
            raise PlanError(
                "kv_num_blocks must be [B|1, H|1, NQ] and kv_indices [B|1, H|1, NQ, K], got shapes "
                f"{tuple(counts.shape)} and {tuple(indices.shape)}"
            )
        if counts.shape[2] != self.q_blocks.num_blocks:
            raise PlanError(
                f"the plan has {counts.shape[2]} query blocks, but q_offsets describe {self.q_blocks.num_blocks}"
            )
        if counts.dtype != torch.int32 or indices.dtype != torch.int32 or counts.device != indices.device:
            raise PlanError(
                f"kv_num_blocks and kv_indices must be int32 on one device, got {counts.dtype} on {counts.device} "
                f"and {indices.dtype} on {indices.device}; convert them with .int()"
            )
        # Kernels walk the lists by pointer.
        object.__setattr__(self, "kv_num_blocks", counts.contiguous())
        object.__setattr__(self, "kv_indices", indices.contiguous())
        if values_known(counts) and values_known(indices):
            self.validate()

    # -- making plans -------------------------------------------------------------------------------------------

    @classmethod
    def from_block_mask(
        cls, mask: Tensor, q_offsets: Offsets, kv_offsets: Offsets, *, max_blocks: int | None = None
    ) -> BlockPlan:
        """From a dense mask, bool [B|1, H|1, NQ, NK], True = compute.

        `max_blocks` bounds the True entries of any row and becomes K; of a longer row, which only the CPU refuses, the
        first so many are kept. Without it K is the longest row on the CPU, and NK on other devices, where finding the
        longest row would mean waiting, and in compiled code.

        Raises:
            PlanError: the mask is not bool, or does not match the offsets.
        """
        q_blocks, kv_blocks = BlockOffsets.of(q_offsets), BlockOffsets.of(kv_offsets)
        _check_tensors(mask=mask)
        _check_max_blocks(max_blocks)
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise PlanError(f"mask must be bool [B|1, H|1, NQ, NK], got {mask.dtype} of shape {tuple(mask.shape)}")
        if tuple(mask.shape[2:]) != (q_blocks.num_blocks, kv_blocks.num_blocks):
            raise PlanError(
                f"a mask of shape {tuple(mask.shape)} does not match {q_blocks.num_blocks} query blocks and "
                f"{kv_blocks.num_blocks} key blocks"
            )
        return cls(*convert.mask_to_lists(mask, max_blocks), q_blocks, kv_blocks)

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        budget: Budget,
        q_offsets: Offsets,
        kv_offsets: Offsets,
        *,
        forced: Tensor | None = None,
    ) -> BlockPlan:
        """The best key blocks of each query block by `scores` [B|1, H|1, NQ, NK] (see `openvsa.plan.rank`).

        Raises:
            PlanError: the scores do not match the offsets.
        """
        q_blocks, kv_blocks = BlockOffsets.of(q_offsets), BlockOffsets.of(kv_offsets)
        _check_tensors(scores=scores)
        if scores.dim() != 4 or tuple(scores.shape[2:]) != (q_blocks.num_blocks, kv_blocks.num_blocks):
            raise PlanError(
                f"scores must be [B|1, H|1, NQ, NK] with {q_blocks.num_blocks} query blocks and {kv_blocks.num_blocks} "
                f"key blocks, got shape {tuple(scores.shape)}"
            )
        return cls(*rank(scores, budget, forced), q_blocks, kv_blocks)

    @classmethod
    def from_csr(
        cls,
        starts: Tensor,
        indices: Tensor,
        q_offsets: Offsets,
        kv_offsets: Offsets,
        *,
        max_blocks: int | None = None,
    ) -> BlockPlan:
        """From compressed rows: `starts` int32 [B|1, H|1, NQ + 1] and `indices` int32 [B|1, H|1, L], where row i is
        indices[starts[i] : starts[i + 1]]. `max_blocks` as in `from_block_mask`.

        Raises:
            PlanError: shapes do not match, or (on the CPU) a row is malformed.
        """
        q_blocks, kv_blocks = BlockOffsets.of(q_offsets), BlockOffsets.of(kv_offsets)
        _check_tensors(starts=starts, indices=indices)
        _check_max_blocks(max_blocks)
        if starts.is_floating_point() or indices.is_floating_point():
            raise PlanError(f"starts and indices must be integers, got {starts.dtype} and {indices.dtype}")
        alike = starts.dim() == indices.dim() == 3 and starts.shape[:2] == indices.shape[:2]
        if not alike or starts.shape[-1] != q_blocks.num_blocks + 1:
            raise PlanError(
                f"starts must be [B|1, H|1, {q_blocks.num_blocks + 1}] and indices [B|1, H|1, L], got shapes "
                f"{tuple(starts.shape)} and {tuple(indices.shape)}"
            )
        return cls(*convert.csr_to_lists(starts, indices, kv_blocks.num_blocks, max_blocks), q_blocks, kv_blocks)

    @classmethod
    def from_flex_block_mask(cls, block_mask: BlockMask) -> BlockPlan:
        """From a FlexAttention BlockMask whose blocks are all full (no mask function inside a block).

        Raises:
            PlanError: some blocks are partial.
        """
        return cls(*convert.flex_to_lists(block_mask))

    @classmethod
    def dense(cls, q_offsets: Offsets, kv_offsets: Offsets, device: torch.device | str = "cpu") -> BlockPlan:
        """Every query block reads every key block.

        Raises:
            ShapeError: `device` names none.
        """
        device = as_device(device)
        q_blocks, kv_blocks = BlockOffsets.of(q_offsets), BlockOffsets.of(kv_offsets)
        num_q, num_kv = q_blocks.num_blocks, kv_blocks.num_blocks
        counts = torch.full((1, 1, num_q), num_kv, dtype=torch.int32, device=device)
        indices = torch.arange(num_kv, dtype=torch.int32, device=device).expand(1, 1, num_q, num_kv)
        return cls(counts, indices, q_blocks, kv_blocks)

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.kv_indices.device

    @property
    def q_offsets(self) -> Tensor:
        """int32 [NQ + 1] on the plan's device."""
        return self.q_blocks.on(self.device)

    @property
    def kv_offsets(self) -> Tensor:
        """int32 [NK + 1] on the plan's device."""
        return self.kv_blocks.on(self.device)

    @property
    def density(self) -> float:
        """The share of all (query block, key block) pairs that is computed, in [0, 1]."""
        pairs = int(self.kv_num_blocks.sum(dtype=torch.int64))
        return pairs / max(1, self.kv_num_blocks.numel() * self.kv_blocks.num_blocks)  # a batch may be empty

    @property
    def cost(self) -> int:
        """Token pairs computed, summed over the batch and head entries that the plan holds."""
        lens = self.kv_blocks.lens_on(self.device).long()
        read = (lens[self.kv_indices.long().clamp(0, lens.numel() - 1)] * self._planned()).sum(-1)
        return int((read * self.q_blocks.lens_on(self.device)).sum())

    def block_mask(self) -> Tensor:
        """Dense form: bool [B|1, H|1, NQ, NK], True = compute."""
        return convert.lists_to_mask(self.kv_num_blocks, self.kv_indices, self.kv_blocks.num_blocks)

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """Compressed rows (`starts` int32 [B|1, H|1, NQ + 1], `indices` int32 [B|1, H|1, NQ * K]); entries of
        `indices` past the last start have no meaning."""
        return convert.lists_to_csr(self.kv_num_blocks, self.kv_indices)

    def transpose_csr(self) -> tuple[Tensor, Tensor]:
        """The readers of each key block as compressed rows (`q_starts` int32 [B|1, H|1, NK + 1], `q_indices` int32
        [B|1, H|1, NQ * K], ascending in each row). Deterministic; made once and kept."""
        if "transpose_csr" not in self._cache:
            self._cache["transpose_csr"] = _to_keep(
                lambda: convert.transpose_lists(self.kv_num_blocks, self.kv_indices, self.kv_blocks.num_blocks)
            )
        return self._cache["transpose_csr"]

    def to_flex_block_mask(self) -> BlockMask:
        """As a FlexAttention BlockMask.

        Raises:
            PlanError: blocks differ in length; FlexAttention needs equal ones (the last may be shorter).
        """
        return convert.lists_to_flex(self.kv_num_blocks, self.kv_indices, self.q_blocks, self.kv_blocks)

    # -- algebra ------------------------------------------------------------------------------------------------

    def transpose(self) -> BlockPlan:
        """The plan that key blocks see: its row j lists the query blocks that read key block j. Made once and kept.

        Its K is the longest row on the CPU, and NQ on other devices.
        """
        if "transpose" not in self._cache:
            csr = self.transpose_csr()
            self._cache["transpose"] = _to_keep(lambda: BlockPlan.from_csr(*csr, self.kv_blocks, self.q_blocks))
        return self._cache["transpose"]

    def union(self, other: BlockPlan) -> BlockPlan:
        """Every block that either plan computes. `plan | other` is the same.

        Raises:
            PlanError: the plans have different blocks or live on different devices.
        """
        self._check_same_blocks(other)
        width = min(self.kv_blocks.num_blocks, self.kv_indices.shape[-1] + other.kv_indices.shape[-1])
        return self._from_mask(self.block_mask() | other.block_mask(), width)

    def intersect(self, other: BlockPlan) -> BlockPlan:
        """Every block that both plans compute. `plan & other` is the same.

        Raises:
            PlanError: the plans have different blocks or live on different devices.
        """
        self._check_same_blocks(other)
        width = min(self.kv_indices.shape[-1], other.kv_indices.shape[-1])
        return self._from_mask(self.block_mask() & other.block_mask(), width)

    __or__ = union
    __and__ = intersect

    def with_dense_blocks(self, rows: Iterable[int] = (), columns: Iterable[int] = ()) -> BlockPlan:
        """A plan in which the query blocks `rows` read everything and the key blocks `columns` are read by all:
        text tokens, sinks, a conditioning frame.

        Raises:
            PlanError: a row or column does not exist.
        """
        rows, columns = _block_numbers("rows", rows), _block_numbers("columns", columns)
        for name, chosen, count in (
            ("row", rows, self.q_blocks.num_blocks),
            ("column", columns, self.kv_blocks.num_blocks),
        ):
            if chosen and (chosen[0] < 0 or chosen[-1] >= count):
                raise PlanError(f"dense {name}s must be in 0..{count - 1}, got {chosen}")
        mask = self.block_mask()
        if rows:
            dense_row = torch.zeros(mask.shape[2], dtype=torch.bool, device="cpu")
            dense_row[rows] = True
            mask = mask | dense_row.to(mask.device, non_blocking=True)[:, None]
        if columns:
            dense_column = torch.zeros(mask.shape[3], dtype=torch.bool, device="cpu")
            dense_column[columns] = True
            mask = mask | dense_column.to(mask.device, non_blocking=True)
        num_kv = self.kv_blocks.num_blocks
        return self._from_mask(mask, num_kv if rows else min(num_kv, self.kv_indices.shape[-1] + len(columns)))

    def coarsen(self, q: int = 1, kv: int = 1) -> BlockPlan:
        """The plan over larger blocks that computes everything this one does: groups of `q` neighbouring query blocks
        read what any of them reads, in groups of `kv` neighbouring key blocks. The last group may hold fewer.

        Its K is at most q times that of this plan. What it computes beyond this plan is `coarse.inflation(plan)`.

        Raises:
            PlanError: q or kv is not a positive integer.
        """
        for name, size in (("q", q), ("kv", kv)):
            if not isinstance(size, int) or size < 1:
                raise PlanError(f"{name} must be a number of neighbouring blocks >= 1, got {size!r}")
        lists = coarsen_lists(self.kv_num_blocks, self.kv_indices, self.kv_blocks.num_blocks, q, kv)
        return BlockPlan(*lists, grouped(self.q_blocks, q), grouped(self.kv_blocks, kv))

    def refine(self, q_offsets: Offsets | None = None, kv_offsets: Offsets | None = None) -> BlockPlan:
        """The same attention over smaller blocks: every token reads the tokens it read before.

        Args:
            q_offsets, kv_offsets: the smaller blocks; a block must end wherever one of the plan ends. None keeps them.

        Raises:
            PlanError: a smaller block lies across the border of two blocks.
        """
        q_blocks = self.q_blocks if q_offsets is None else BlockOffsets.of(q_offsets)
        kv_blocks = self.kv_blocks if kv_offsets is None else BlockOffsets.of(kv_offsets)
        parts = pieces(self.q_blocks, q_blocks), pieces(self.kv_blocks, kv_blocks)
        return BlockPlan(*refine_lists(self.kv_num_blocks, self.kv_indices, *parts), q_blocks, kv_blocks)

    def inflation(self, other: BlockPlan) -> float:
        """Token pairs that this plan computes for each one that `other` computes, per batch and head entry: 1 if they
        compute equally many. Waits for the device.

        Raises:
            PlanError: the plans are over different token counts, or `other` computes nothing.
        """
        _check_plan(other)
        tokens = [(plan.q_blocks.num_tokens, plan.kv_blocks.num_tokens) for plan in (self, other)]
        costs = [plan.cost / plan.kv_num_blocks[..., 0].numel() for plan in (self, other)]
        if tokens[0] != tokens[1] or not costs[1]:
            raise PlanError(
                f"inflation compares plans over the same tokens, of which the second computes something; got "
                f"{tokens[0]} query and key tokens beside {tokens[1]}, and {costs[1]:g} token pairs in the second"
            )
        return costs[0] / costs[1]

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device.

        Raises:
            ShapeError: `device` names none.
        """
        device = as_device(device)
        if device == self.device:
            return self
        return BlockPlan(self.kv_num_blocks.to(device), self.kv_indices.to(device), self.q_blocks, self.kv_blocks)

    # -- checks, files, words -----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every count and index. Waits for the device.

        Raises:
            PlanError: a count is outside 0..K, or an index is outside 0..NK - 1, repeated or out of order.
        """
        counts, indices = self.kv_num_blocks, self.kv_indices
        width, num_kv = indices.shape[-1], self.kv_blocks.num_blocks
        if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= width:
            raise PlanError(
                f"kv_num_blocks must be in 0..K = {width}, got values from {int(counts.min())} to {int(counts.max())}"
            )
        planned = self._planned()
        outside = planned & ((indices < 0) | (indices >= num_kv))
        if outside.any():
            at = outside.nonzero()[0].tolist()
            raise PlanError(
                f"kv_indices{at} is {int(indices[tuple(at)])}, but there are {num_kv} key blocks: indices must be "
                f"in 0..{num_kv - 1}"
            )
        unordered = planned[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        if unordered.any():
            at = unordered.nonzero()[0].tolist()
            pair = indices[tuple(at[:3])].tolist()[at[3] : at[3] + 2]
            raise PlanError(
                f"kv_indices must strictly ascend within a row, got {pair} in row {at[:3]} at position "
                f"{at[3]}; sort the row and drop repeats"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a safetensors file (needs the extra `io`). The file appears whole or not at all."""
        convert.save_lists(path, self.kv_num_blocks, self.kv_indices, self.q_blocks, self.kv_blocks)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> BlockPlan:
        """Read a plan that `save` wrote (needs the extra `io`).

        Raises:
            PlanError: the file is missing, damaged or not a plan.
            ShapeError: `device` names none.
        """
        return cls(*convert.load_lists(path)).to(device)

    def __repr__(self) -> str:
        batch, heads, num_q = self.kv_num_blocks.shape
        counts = self.kv_num_blocks
        spread = "all heads alike" if heads == 1 else f"{heads} heads"
        if counts.device.type == "meta" or isinstance(counts, FakeTensor):  # nobody knows their numbers
            per_row, kept = f"up to {self.kv_indices.shape[-1]}", ""
        else:
            low, high = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
            per_row = f"{low}" if low == high else f"{low} to {high}"
            kept = f"density {self.density:.3f}, {self.cost:,} token pairs; "
        return (
            f"BlockPlan({num_q} query blocks ({self.q_blocks.num_tokens} tokens) read {per_row} of "
            f"{self.kv_blocks.num_blocks} key blocks ({self.kv_blocks.num_tokens} tokens) each; "
            f"{kept}batch {batch}, {spread}, {self.device})"
        )

    def _planned(self) -> Tensor:
        slot = torch.arange(self.kv_indices.shape[-1], device=self.device)
        return slot < self.kv_num_blocks[..., None]

    def _from_mask(self, mask: Tensor, max_blocks: int) -> BlockPlan:
        width = None if mask.device.type == "cpu" else max_blocks
        return BlockPlan.from_block_mask(mask, self.q_blocks, self.kv_blocks, max_blocks=width)

    def _check_same_blocks(self, other: BlockPlan) -> None:
        _check_plan(other)
        if self.q_blocks != other.q_blocks or self.kv_blocks != other.kv_blocks or self.device != other.device:
            raise PlanError(
                f"plans can only be combined over the same blocks on one device, got {self.q_blocks} by "
                f"{self.kv_blocks} on {self.device} and {other.q_blocks} by {other.kv_blocks} on {other.device}"
            )


def _to_keep(make: Callable[[], Any]) -> Any:
    """What `make` makes, fit for training: asked for first in inference mode, it may be wanted outside later."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False):
        return make()


def _check_plan(other: object) -> None:
    if not isinstance(other, BlockPlan):
        raise PlanError(
            f"the other plan must be a BlockPlan, got {type(other).__name__}; BlockPlan.from_block_mask makes one"
        )


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise PlanError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")


def _check_max_blocks(max_blocks: object) -> None:
    if max_blocks is not None and (not isinstance(max_blocks, int) or max_blocks < 0):
        raise PlanError(f"max_blocks must be a number of blocks >= 0 or None, got {max_blocks!r}")


def _block_numbers(name: str, numbers: Iterable[int]) -> list[int]:
    try:
        return sorted({operator.index(number) for number in numbers})
    except TypeError:
        raise PlanError(f"{name} must be numbers of blocks such as [0, 3], got {numbers!r}") from None
