"""What got slower is found, and nothing that cannot be compared is."""

from __future__ import annotations

from typing import Any

import pytest

from openvsa import OpenVSAError
from openvsa.bench.compare import changes


def record(device: str = "GPU", case: str = "s32k", **ms: float) -> dict[str, Any]:
    rows = [
        {"op": "attention", "contender": name, "kind": "dense" if name.startswith("dense") else "openvsa",
         "plan": "random 1/8", "pass": "forward", "ms": value}
        for name, value in ms.items()
    ]  # fmt: skip
    return {"machine": {"device": device}, "cases": [{"name": case, "rows": rows}]}


def test_slower_and_faster() -> None:
    found = changes(record(triton=1.0, cpu=2.0, dense=1.0), record(triton=1.2, cpu=1.0, dense=2.0))
    assert [(c.contender, c.ratio) for c in found] == [("dense", 2.0), ("triton", 1.2), ("cpu", 0.5)]
    assert [c.contender for c in found if c.is_slower(0.05)] == ["triton"]
    assert not any(c.is_slower(0.25) for c in found)


def test_what_only_one_run_has_is_listed_last() -> None:
    found = changes(record(triton=1.0, cpu=1.0), record(triton=1.0, hopper=1.0))
    assert [(c.contender, c.before, c.after) for c in found] == [
        ("triton", 1.0, 1.0),
        ("cpu", 1.0, None),
        ("hopper", None, 1.0),
    ]
    assert not any(c.is_slower(0.0) for c in found)


def test_other_machines_and_cases_are_refused() -> None:
    with pytest.raises(OpenVSAError, match="different machines cannot be compared: 'GPU' and 'TPU'"):
        changes(record(triton=1.0), record("TPU", triton=1.0))
    with pytest.raises(OpenVSAError, match="no measurement in common: cases s32k and s8k"):
        changes(record(triton=1.0), record(case="s8k", triton=1.0))
