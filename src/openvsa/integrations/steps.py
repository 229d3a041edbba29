"""Which denoising step a forward belongs to, and which branch of guidance, told by identity and never by counting."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from openvsa.errors import UnsupportedError, require

if TYPE_CHECKING:
    from openvsa.integrations.config import SparsityConfig

__all__ = [
    "StepClock",
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
        self._timesteps: list[float] = []

    def tick(self, level: float, grid: tuple[int, ...], pipeline: Any = None, *, running: bool = False) -> bool:
        """Take note of a forward; True if it begins a generation.

        `pipeline` has the scheduler, if there is one, and is `running` if it makes this forward. Pipelines make
        timesteps anew for every generation, which tells one that begins at a low noise level from the rest of one that
        was interrupted. A running one says which step it is at, where this is the first forward of its second
        transformer, or a handle was made between its steps; and a change of lattice does not begin it anew.
        """
        schedule, place = timesteps_of(pipeline), place_of(pipeline)
        other = schedule is not None and (self._schedule is None or self._schedule() is not schedule)
        if schedule is not None and other:
            self._schedule, self._timesteps = weakref.ref(schedule), schedule.tolist()
        timestep = None if place is None else self._timesteps[place]
        rises = self._level is None or level > self._level
        if fresh := other or rises or (grid != self._grid and not (running and place is not None)):
            done = self._timesteps[_begin(pipeline) : place + 1] if other and running and place is not None else [0.0]
            self.step = len(set(done)) - 1
        elif (level, timestep) != (self._level, self._timestep):
            self.step += 1
        self._level, self._timestep, self._grid = level, timestep, grid
        return fresh

    def count(self, pipeline: Any) -> int:
        """Denoising steps of the generation that was noted last, which `pipeline` is at.

        Raises:
            UnsupportedError: the pipeline, or its scheduler, is gone.
        """
        if timesteps_of(pipeline) is None:
            raise UnsupportedError(
                "dense_last_steps needs the pipeline given to sparsify, but it, or its scheduler, is gone; keep it"
            )
        end = len(self._timesteps) - (type(pipeline).__name__ in _LEAVE_OUT_THE_LAST)
        # What the scheduler says holds also for a pipeline of modular blocks.
        if self.step and (place := place_of(pipeline)) is not None:
            return self.step + len(set(self._timesteps[place:end]))
        return len(set(self._timesteps[_begin(pipeline) : end]))


# Pipelines that make no step of the last of their timesteps.
_LEAVE_OUT_THE_LAST = ("LTXI2VLongMultiPromptPipeline",)


def _begin(pipeline: Any) -> int:
    """Where in its timesteps a pipeline begins. Video to video begins midway: Diffusers' pipelines have the number of
    those that are left."""
    timesteps = timesteps_of(pipeline)
    assert timesteps is not None
    # It may be that of an earlier generation, in a loop of the user's own.
    return max(0, len(timesteps) - (getattr(pipeline, "num_timesteps", None) or len(timesteps)))


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
    diffusers = require("diffusers", extra="diffusers")
    frame = inspect.currentframe()
    while frame is not None:
        # Of other frames nothing is read: until Python 3.13 that would keep their variables for as long as they run.
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(owner, diffusers.DiffusionPipeline | diffusers.ModularPipeline) and _serves(owner, transformer):
            return owner
        frame = frame.f_back
    return None


def _serves(pipeline: Any, transformer: Any) -> bool:
    """Whether a pipeline has this transformer, and a scheduler."""
    parts = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    return timesteps_of(pipeline) is not None and any(getattr(one, "_orig_mod", one) is transformer for one in parts)


def timesteps_of(pipeline: Any) -> Tensor | None:
    """Those of the scheduler that a pipeline has now; None without a pipeline, or a scheduler."""
    return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)


def place_of(pipeline: Any) -> int | None:
    """The place of the scheduler in its timesteps. None before it has made a step, past the last one, which is of a
    generation that has ended, and of a scheduler that does not say."""
    timesteps, at = timesteps_of(pipeline), getattr(getattr(pipeline, "scheduler", None), "step_index", None)
    return None if timesteps is None or at is None or at >= len(timesteps) else at


def warn_if_all_dense(config: SparsityConfig, steps: int) -> None:
    """Say so if none of so many steps will be sparse, as with a preset for 50 steps in a pipeline of 4."""
    if config.dense_first_steps + config.dense_last_steps >= steps:
        warnings.warn(
            f"all {steps} steps of this generation stay dense: dense_first_steps is {config.dense_first_steps} and "
            f"dense_last_steps {config.dense_last_steps}; SparsityConfig.preset takes the number of steps",
            stacklevel=2,
        )
