"""Plans that serve more than one denoising step, kept for each branch of guidance."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openvsa.errors import UnsupportedError
from openvsa.plan import BlockPlan

__all__ = ["Kept", "KeptPlans"]


@dataclass
class Kept:
    """The plans of one layer and one branch of guidance, by part of the batch and the size of the batch."""

    plans: dict[tuple[int, int], BlockPlan] = field(default_factory=dict)
    compiled: bool = False  # they were made in a compiled block, and may lie in memory of its CUDA graph

    def settle(self) -> None:
        """Give plans from compiled blocks memory that no replay overwrites.

        Raises:
            UnsupportedError: it was overwritten already.
        """
        try:
            self.plans = {
                place: BlockPlan(plan.kv_num_blocks.clone(), plan.kv_indices.clone(), plan.q_blocks, plan.kv_blocks)
                for place, plan in self.plans.items()
            }
        except RuntimeError as error:
            raise UnsupportedError(
                "the plans that reuse_steps keeps were made inside CUDA graphs of torch.compile, which overwrote them; "
                "call torch.compiler.cudagraph_mark_step_begin() before each forward of the transformer, compile "
                "without mode='reduce-overhead', or leave reuse_steps at 1"
            ) from error
        self.compiled = False


@dataclass
class _Reuse:
    """The plans of one branch of guidance: made in `step`, for sequences like `about`. The branch is told by the tensor
    that conditions it, and by what else tells it from others with the same tensor."""

    condition: weakref.ref[Tensor]
    variant: tuple[Any, ...]
    step: int
    about: tuple[Any, ...]
    layers: dict[int, Kept] = field(default_factory=dict)


class KeptPlans:
    """The plans of all branches of guidance that the current generation may use again, for as long as the tensors live
    that condition them."""

    def __init__(self) -> None:
        self._made: list[_Reuse] = []
        self._gone_since: int | None = None  # the step whose condition is no more
        self._told = False

    def clear(self) -> None:
        """Begin anew: another generation, or other settings."""
        self._made.clear()
        self._gone_since = None

    def of(
        self, condition: Tensor | None, variant: tuple[Any, ...], about: tuple[Any, ...], step: int, serves: int
    ) -> dict[int, Kept]:
        """What layers keep, by their number, of the branch of guidance that a forward belongs to.

        It is empty where the forward has to make plans, which then serve `serves` steps, this one included.

        Args:
            condition, variant: what tells the branch from others, see `Family.condition` and `Family.variant`.
            about: what plans are made for; they serve nothing else.
        """
        if condition is None:  # branches cannot be told
            return {}
        found = next((one for one in self._made if one.condition() is condition and one.variant == variant), None)
        # Steps begin to count with the plans: dense ones before do not. A second forward in the step that made the
        # plans may be of another generation that begins at the same level.
        if (
            found is not None
            and found.about == about
            and 0 < step - found.step < serves
            and any(kept.plans for kept in found.layers.values())
        ):
            self._told = True  # some prompts last
            return found.layers
        if not (self._made or self._told) and self._gone_since is not None and step > self._gone_since:
            self._told = True
            warnings.warn(
                f"reuse_steps is {serves}, but no plan can be used again: every forward is given another tensor as its "
                "prompt, as where a pipeline converts the dtype of embeddings in each step. Give embeddings in the "
                "dtype of the transformer, and the same tensor in every step",
                stacklevel=2,
            )
        made = _Reuse(weakref.ref(condition, self._forget), variant, step, about)
        self._made = [*(one for one in self._made if one is not found), made]
        return made.layers

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._gone_since = next((one.step for one in self._made if one.condition is gone), self._gone_since)
        self._made = [one for one in self._made if one.condition is not gone]
