"""Constants of the cost model for tests, so that no test depends on what was measured last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openvsa.integrations import break_even

NOTHING = {
    "dense_ms_per_pair": 0.0, "sparse_ms_per_pair": 0.0, "ms_per_element": 0.0, "ms_per_block_pair": 0.0,
    "overhead_ms": 0.0, "host_ms": 0.0,
}  # fmt: skip


@contextmanager
def machine(folder: Path, **costs: float) -> Iterator[None]:
    """Inside, every machine is one called X on which attention has these costs, and no others."""
    constants = {kind: {"device": "X", "head_dims": {"24": NOTHING | costs}} for kind in ("cpu", "NVIDIA H200")}
    file = folder / "constants.json"
    file.write_text(json.dumps(constants))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(break_even, "_FILE", file)
            _forget()
            yield
    finally:
        _forget()


def _forget() -> None:
    break_even._constants.cache_clear()
    break_even.predict_on.cache_clear()
