"""Which denoising step a forward belongs to, and which branch of guidance, told by identity and never by counting."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from openvsa.errors import UnsupportedError

if TYPE_CHECKING:
    from openvsa.integrations.config import SparsityConfig

__all__ = [
    "Branches",
    "StepClock",
    "count_steps",
    "place_of",
    "running_pipeline",
    "timesteps_of",
    "warn_if_all_dense",
    "weakly",
]


class StepClock:
    """Steps of one generation. A forward at the same noise level belongs to the same step, a lower level is the next
    step, and a higher level, another lattice, or another schedule begins a new generation.

    Some pipelines round levels to bfloat16, in which neighbouring steps may have one: what their scheduler says, which
    is not rounded, tells these apart. It counts a second-order step as two, but at the same timestep.
    """

    def __init__(self) -> None:
        self.step = -1
        self._level: float | None = None
        self._timestep: float | None = None
        self._grid: tuple[int, ...] | None = None
        self._schedule: weakref.ref[Tensor] | None = None

    def tick(
        self, level: float, grid: tuple[int, ...], schedule: Tensor | None = None, timestep: float | None = None
    ) -> bool:
        """Take note of a forward; True if it begins a generation.

        `schedule` is the timesteps of the scheduler, if there is one. Pipelines make them anew for every generation,
        which tells one that begins at a low noise level from the rest of one that was interrupted. `timestep` is the
        one that the scheduler is at, if it says.
        """
        fresh = self._level is None or level > self._level or grid != self._grid
        if schedule is not None and (self._schedule is None or self._schedule() is not schedule):
            fresh = True
            self._schedule = weakref.ref(schedule)
        if fresh:
            self.step = 0
        elif (level, timestep) != (self._level, self._timestep):
            self.step += 1
        self._level, self._timestep, self._grid = level, timestep, grid
        return fresh


def weakly(model: Any) -> Callable[[], Any]:
    """A way to the model that does not keep it: whoever keeps the transformer of a pipeline may drop the rest."""
    try:
        return weakref.ref(model)
    except TypeError:  # some classes cannot be referred to weakly
        return lambda: model


def running_pipeline(transformer: Any) -> Any:
    """The pipeline of Diffusers that calls this transformer now; None where something else does.

    Pipelines may share a transformer, and only the one that runs has the scheduler that counts. Nothing that a forward
    is given says which one that is, so it is looked for among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            # Of other classes nothing is asked, which might be a property that does something.
            if any(kind.__module__.startswith("diffusers.") for kind in type(owner).__mro__):
                parts = [getattr(owner, name, None) for name in ("transformer", "transformer_2", "scheduler")]
                if any(getattr(part, "_orig_mod", part) is transformer for part in parts[:2]) and parts[2] is not None:
                    return owner
        frame = frame.f_back
    return None


def timesteps_of(pipeline: Any) -> Tensor | None:
    """Those of the scheduler that a pipeline has now; None without a pipeline, or a scheduler."""
    return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)


def place_of(pipeline: Any) -> int | None:
    """The place of the scheduler in its timesteps. None before it has made a step, past the last one, which is of a
    generation that has ended, and of a scheduler that does not say."""
    timesteps, at = timesteps_of(pipeline), getattr(getattr(pipeline, "scheduler", None), "step_index", None)
    return None if timesteps is None or at is None or at >= len(timesteps) else at


def count_steps(pipeline: Any, step: int = 0) -> int:
    """How many steps the generation has that a pipeline is at, in step `step`.

    Raises:
        UnsupportedError: the pipeline, or its scheduler, is gone.
    """
    timesteps = timesteps_of(pipeline)
    if timesteps is None:
        raise UnsupportedError(
            "dense_last_steps needs the pipeline given to sparsify, but it, or its scheduler, is gone; keep it", {}
        )
    # What the scheduler says holds also for a pipeline of modular blocks.
    if step and (at := place_of(pipeline)) is not None:
        return step + len(timesteps[at:].unique())
    # Video to video begins midway: Diffusers' pipelines have the number of those that are left.
    left = getattr(pipeline, "num_timesteps", None) or len(timesteps)
    return len(timesteps[-left:].unique())


def warn_if_all_dense(config: SparsityConfig, pipeline: Any) -> None:
    """Say so if no step of the generation that a pipeline begins will be sparse, as with a preset for 50 steps in a
    pipeline of 4."""
    steps = count_steps(pipeline)
    if config.dense_first_steps + config.dense_last_steps >= steps:
        warnings.warn(
            f"all {steps} steps of this generation stay dense: dense_first_steps is {config.dense_first_steps} and "
            f"dense_last_steps {config.dense_last_steps}; SparsityConfig.preset takes the number of steps",
            stacklevel=2,
        )


class Branches:
    """Something kept for each branch of guidance, found by the tensor that conditions the branch, and by what else
    tells it from others with the same tensor."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], tuple[Any, ...], Any]] = []

    def find(self, condition: Tensor | None, variant: tuple[Any, ...]) -> Any:
        """What is kept for this very tensor, or None."""
        self._kept = [entry for entry in self._kept if entry[0]() is not None]
        if condition is None:
            return None
        return next((value for ref, of, value in self._kept if ref() is condition and of == variant), None)

    def keep(self, condition: Tensor | None, variant: tuple[Any, ...], value: Any) -> None:
        """Keep `value` for as long as the tensor lives; without one nothing is kept, as branches cannot be told."""
        if condition is not None:
            self._kept = [entry for entry in self._kept if entry[0]() is not condition or entry[1] != variant]
            self._kept.append((weakref.ref(condition, self._forget), variant, value))

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._kept = [entry for entry in self._kept if entry[0] is not gone]

    def clear(self) -> None:
        self._kept.clear()
