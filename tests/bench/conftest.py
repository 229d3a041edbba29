from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from openvsa.ops import registry
from openvsa.ops.capability import Backend
from openvsa.ops.registry import backends
from openvsa.plan import BlockPlan

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Backend]:
    """Put a backend named "broken" into the registry: the reference, with what it returns changed."""

    def put(change: Change) -> Backend:
        reference = next(backend for backend in backends() if backend.name == "reference")

        def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
            return change(*reference.run(q, k, v, plan, scale))

        broken = replace(reference, name="broken", run=run)
        monkeypatch.setattr(registry, "_BACKENDS", (*backends(), broken))
        return broken

    return put
