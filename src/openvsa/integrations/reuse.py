"""Plans that serve more than one denoising step, kept for each branch of guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openvsa.errors import UnsupportedError
from openvsa.integrations.steps import Branches
from openvsa.plan import BlockPlan

__all__ = ["Kept", "KeptPlans"]


@dataclass
class Kept:
    """The plans of one layer and one branch of guidance, by part of the batch."""

    plans: dict[int, BlockPlan] = field(default_factory=dict)
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
                "without mode='reduce-overhead', or leave reuse_steps at 1",
                {},
            ) from error
        self.compiled = False


@dataclass
class _Reuse:
    """The plans of one branch of guidance: made in `step`, for sequences like `about`."""

    step: int
    about: tuple[Any, ...]
    layers: dict[int, Kept]


class KeptPlans:
    """The plans of all branches of guidance that the current generation may use again."""

    def __init__(self) -> None:
        self._branches = Branches()

    def clear(self) -> None:
        """Begin anew: another generation, or other settings."""
        self._branches.clear()

    def of(
        self, condition: Tensor | None, variant: tuple[Any, ...], about: tuple[Any, ...], step: int, serves: int
    ) -> dict[int, Kept]:
        """What layers keep, by their number, of the branch of guidance that a forward belongs to.

        It is empty where the forward has to make plans, which then serve `serves` steps, this one included.

        Args:
            condition, variant: what tells the branch from others, see `Family.condition` and `Family.variant`.
            about: what plans are made for; they serve nothing else.
        """
        found: _Reuse | None = self._branches.find(condition, variant)
        # Steps begin to count with the plans: dense ones before do not. A second forward in the step that made the
        # plans may be of another generation that begins at the same level.
        if (
            found is None
            or found.about != about
            or not 0 < step - found.step < serves
            or not any(kept.plans for kept in found.layers.values())
        ):
            found = _Reuse(step, about, {})
            self._branches.keep(condition, variant, found)
        return found.layers
