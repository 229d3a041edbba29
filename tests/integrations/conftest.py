from __future__ import annotations

from collections.abc import Iterator

import pytest

import cost_model


@pytest.fixture(autouse=True)
def sparse_however_small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models stand for big ones: on this machine only dense attention takes time."""
    with cost_model.machine(tmp_path_factory.mktemp("costs"), dense_ms_per_pair=1.0):
        yield
