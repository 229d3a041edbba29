"""Where blocks begin and end along a sequence."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from openvsa.errors import PlanError
from openvsa.layout.keep import as_computed_here, build_to_keep, can_keep

__all__ = ["MAX_TOKENS", "BlockOffsets"]

MAX_TOKENS = 2**31 - 1  # offsets are int32


class BlockOffsets:
    """The lengths of the N consecutive blocks that a sequence of S tokens is cut into. Immutable.

    Lengths are known on the host, so that checking a plan or choosing a kernel never waits for a device; copies
    on devices are made once each and kept.

    Args:
        lens: tokens of each block, in order.

    Attributes:
        lens: the same, as a tuple.
        num_tokens: S, their sum.
        max_len: tokens of the longest block.
        uniform_len: the length that all blocks have (the last one may be shorter), or None if they differ.

    Raises:
        PlanError: a length is not a positive integer, there is no block, or the tokens are more than int32 can count.
    """

    __slots__ = ("_on_device", "lens", "max_len", "num_tokens", "uniform_len")

    def __init__(self, lens: Sequence[int]) -> None:
        whole = _integers(lens)
        if not whole or min(whole) < 1:
            raise PlanError(
                f"block lengths must be positive integers and at least one block is needed, got {_shorten(lens)}; "
                "block offsets must start at 0 and strictly increase"
            )
        self.lens = lens = tuple(whole)
        self.num_tokens = sum(lens)
        if self.num_tokens > MAX_TOKENS:
            raise PlanError(
                f"blocks may hold at most {MAX_TOKENS:,} tokens in all, because block offsets are int32, got "
                f"{self.num_tokens:,}; check the lengths, or split the sequence"
            )
        self.max_len = max(lens)
        alike = all(n == lens[0] for n in lens[:-1]) and lens[-1] <= lens[0]
        self.uniform_len = lens[0] if alike else None
        self._on_device: dict[tuple[torch.device, str], Tensor] = {}

    @classmethod
    def of(cls, offsets: BlockOffsets | Tensor | Sequence[int]) -> BlockOffsets:
        """Take offsets [N + 1] from anything that holds them. A tensor on a device costs one synchronisation.

        Raises:
            PlanError: the offsets do not start at 0 or do not strictly increase.
        """
        if isinstance(offsets, BlockOffsets):
            return offsets
        values = _integers(offsets.tolist() if isinstance(offsets, Tensor) else offsets)
        if values is None or len(values) < 2 or values[0] != 0:
            raise PlanError(
                f"block offsets must be N + 1 integers that start at 0, got {_shorten(offsets)}; "
                "for blocks of 3 and 2 tokens pass [0, 3, 5]"
            )
        lens = [b - a for a, b in pairwise(values)]
        if min(lens) < 1:
            at = next(i for i, n in enumerate(lens) if n < 1)
            raise PlanError(
                f"block offsets must strictly increase, got {values[at]} followed by {values[at + 1]} "
                f"at position {at}; every block holds at least one token"
            )
        return cls(lens)

    @property
    def num_blocks(self) -> int:
        """N."""
        return len(self.lens)

    def on(self, device: torch.device) -> Tensor:
        """Offsets as an int32 tensor [N + 1] on `device`."""
        found = self._on_device.get((device, "offsets"))  # asked for several times in every call of attention
        if found is None:
            return self._cached(
                device, "offsets", lambda: torch.tensor([0, *accumulate(self.lens)], dtype=torch.int32, device="cpu")
            )
        return as_computed_here(found)

    def lens_on(self, device: torch.device) -> Tensor:
        """Lengths as an int32 tensor [N] on `device`."""
        return self._cached(device, "lens", lambda: torch.tensor(self.lens, dtype=torch.int32, device="cpu"))

    def block_of_token(self, device: torch.device) -> Tensor:
        """The block each token belongs to, int64 [S] on `device`."""
        # The size is said because Dynamo does not look at the lengths.
        return self._cached(
            device,
            "block",
            lambda: torch.repeat_interleave(torch.tensor(self.lens, device="cpu"), output_size=self.num_tokens),
        )

    def padded_slots(self, device: torch.device) -> Tensor:
        """Token index of each slot of each block, int64 [N, max_len]; a slot past a block's end repeats its last
        token and must be masked."""

        def build() -> Tensor:
            lens = torch.tensor(self.lens, device="cpu")[:, None]
            slots = torch.arange(self.max_len, device="cpu")
            return lens.cumsum(0) - lens + slots.expand(len(self.lens), -1).minimum(lens - 1)

        return self._cached(device, "slots", build)

    def _cached(self, device: torch.device, what: str, build: Callable[[], Tensor]) -> Tensor:
        device = torch.device(device)
        found = self._on_device.get((device, what))
        if found is None:
            if device.type == "cpu":
                found = build_to_keep(build)
            else:
                with torch.inference_mode(False):
                    found = self._cached(torch.device("cpu"), what, build).to(device, non_blocking=True)
            if can_keep(found):
                self._on_device[device, what] = found
        return as_computed_here(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockOffsets) and self.lens == other.lens

    def __hash__(self) -> int:
        return hash(self.lens)

    def __repr__(self) -> str:
        sizes = f"{self.max_len}" if min(self.lens) == self.max_len else f"{min(self.lens)} to {self.max_len}"
        return f"BlockOffsets({self.num_blocks} blocks of {sizes} tokens, {self.num_tokens} in all)"


def _integers(values: Iterable[Any]) -> list[int] | None:
    """Plain integers, or None if some value is anything else."""
    try:
        return [operator.index(n) for n in values]
    except TypeError:
        return None


def _shorten(values: object) -> str:
    text = str(values)
    return text if len(text) <= 80 else text[:77] + "..."
