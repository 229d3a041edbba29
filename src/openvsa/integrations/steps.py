"""Which denoising step a forward belongs to, and which branch of guidance, told by identity and never by counting."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

__all__ = ["Branches", "StepClock"]


class StepClock:
    """Steps of one generation. A forward at the same noise level belongs to the same step, a lower level is the next
    step, and a higher level, another lattice, or another schedule begins a new generation."""

    def __init__(self) -> None:
        self.step = -1
        self._level: float | None = None
        self._grid: tuple[int, ...] | None = None
        self._schedule: weakref.ref[Tensor] | None = None

    def tick(self, level: float, grid: tuple[int, ...], schedule: Tensor | None = None) -> bool:
        """Take note of a forward; True if it begins a generation.

        `schedule` is the timesteps of the pipeline's scheduler, if there is one. Pipelines make them anew for every
        generation, which tells one that begins at a low noise level from the rest of one that was interrupted.
        """
        fresh = self._level is None or level > self._level or grid != self._grid
        if schedule is not None and (self._schedule is None or self._schedule() is not schedule):
            fresh = True
            self._schedule = weakref.ref(schedule)
        if fresh:
            self.step = 0
        elif level != self._level:
            self.step += 1
        self._level, self._grid = level, grid
        return fresh


class Branches:
    """Something kept for each branch of guidance, found by the tensor that conditions the branch."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], Any]] = []

    def find(self, condition: Tensor | None) -> Any:
        """What is kept for this very tensor, or None."""
        self._kept = [(ref, value) for ref, value in self._kept if ref() is not None]
        return next((value for ref, value in self._kept if condition is not None and ref() is condition), None)

    def keep(self, condition: Tensor | None, value: Any) -> None:
        """Keep `value` for as long as the tensor lives; without one nothing is kept, as branches cannot be told."""
        if condition is not None:
            self._kept = [pair for pair in self._kept if pair[0]() is not condition]
            self._kept.append((weakref.ref(condition), value))

    def clear(self) -> None:
        self._kept.clear()
