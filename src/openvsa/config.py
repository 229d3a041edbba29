"""Validated settings, and the only reader of the environment."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from openvsa.errors import BudgetError

__all__ = ["Budget"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many key blocks each query block may read. Exactly one of the first three is given.

    Args:
        top_k: a number of blocks.
        keep_ratio: a share of the blocks in (0, 1]; of N blocks, max(1, ceil(keep_ratio * N)) are kept.
        top_p: a share of estimated attention mass in (0, 1]; the fewest best blocks that reach it are kept.
        min_blocks, max_blocks: bounds on the number kept, whatever the first three say.
        keep_self: always keep the key block at the query block's own position; it counts towards the budget.
        keep_first: always keep this many leading key blocks (attention sinks); they count towards the budget.

    Raises:
        BudgetError: none or several of the first three are given, or a number is out of its range.
    """

    top_k: int | None = None
    keep_ratio: float | None = None
    top_p: float | None = None
    min_blocks: int = 1
    max_blocks: int | None = None
    keep_self: bool = False
    keep_first: int = 0

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("top_k", "keep_ratio", "top_p")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"a budget needs exactly one of top_k, keep_ratio and top_p, got {given or 'none of them'}; "
                "for example Budget(keep_ratio=0.125)"
            )
        for name, said in (("keep_ratio", "keep_ratio, the density,"), ("top_p", "top_p")):
            share = getattr(self, name)
            if share is None:
                continue
            # A pair, for torch.compile of torch 2.9 cannot check against a union.
            if not isinstance(share, (int, float)) or isinstance(share, bool):
                raise BudgetError(f"{said} must be a number in (0, 1], an int or a float, got {share!r}")
            if not 0 < share <= 1:
                raise BudgetError(f"{said} must be in (0, 1], got {share}; 1 keeps everything")
            if type(share) not in (int, float):  # NumPy's double is a float, which files of settings cannot hold
                object.__setattr__(self, name, float(share))
        for name, least in (("top_k", 1), ("min_blocks", 1), ("max_blocks", 1), ("keep_first", 0)):
            count = getattr(self, name)
            if count is None and name in ("top_k", "max_blocks"):
                continue
            try:
                whole = least - 1 if isinstance(count, bool) else operator.index(count)  # pyright: ignore
            except TypeError:
                whole = least - 1
            if whole < least:
                raise BudgetError(f"{name} must be a whole number of blocks >= {least}, got {count!r}")
            if type(count) is not int:
                object.__setattr__(self, name, whole)
        if not isinstance(self.keep_self, bool):
            raise BudgetError(f"keep_self must be True or False, got {self.keep_self!r}")
        if self.max_blocks is not None and self.max_blocks < self.min_blocks:
            raise BudgetError(
                f"blocks must satisfy min_blocks <= max_blocks, got min_blocks={self.min_blocks} "
                f"and max_blocks={self.max_blocks}"
            )

    def blocks(self, num_blocks: int) -> int:
        """The number of key blocks kept of `num_blocks`; for top_p, the most that can be kept.

        Raises:
            BudgetError: the blocks that must always be kept are more than the budget.
        """
        if self.top_k is not None:
            kept = self.top_k
        elif self.keep_ratio is not None:
            # The small subtraction undoes float rounding: 0.1 * 30 is 3.0000000000000004.
            kept = math.ceil(self.keep_ratio * num_blocks - 1e-9)
        else:
            kept = num_blocks
        kept = max(kept, self.min_blocks)
        kept = min(kept, num_blocks, self.max_blocks or num_blocks)
        forced = min(self.keep_first, num_blocks) + int(self.keep_self)  # Dynamo of torch 2.9 adds no bool
        if forced > max(kept, 1) and kept < num_blocks:
            raise BudgetError(
                f"{forced} blocks must always be kept (keep_first={self.keep_first}, keep_self={self.keep_self}) but "
                f"the budget is {kept} of {num_blocks} blocks; raise the budget or min_blocks"
            )
        return kept


def is_number(value: object) -> bool:
    """Whether this is a real number, of NumPy too; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def triton_interpret() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def spinning_is_bounded() -> bool:
    """Whether the environment says how long OpenMP's threads spin while they wait (GOMP_SPINCOUNT, OMP_WAIT_POLICY)."""
    return "GOMP_SPINCOUNT" in os.environ or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


def machine_fact(function: F) -> F:
    """Mark a function whose answers cannot change while the process runs, such as whether a package is installed:
    torch.compile then calls it while it traces, and compiles the answer in.

    This is torch.compiler.assume_constant_result without its import of Dynamo, which takes longer than all of ours.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
