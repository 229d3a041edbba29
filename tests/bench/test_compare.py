"""What got slower is found, and nothing that cannot be compared is."""

from __future__ import annotations

from typing import Any

import pytest

from openvsa import OpenVSAError
from openvsa.bench.compare import changes, newly_failed, newly_left_out, versions_changed


def record(device: str = "GPU", case: str = "s32k", **ms: float) -> dict[str, Any]:
    rows = [
        {"op": "attention", "contender": name, "kind": "dense" if name.startswith("dense") else "openvsa",
         "plan": "random 1/8", "pass": "forward", "ms": value}
        for name, value in ms.items()
    ]  # fmt: skip
    return {"machine": {"device": device}, "cases": [{"name": case, "rows": rows, "passed": True, "head_dim": 128}]}


def failed(of: dict[str, Any], *why: Any) -> dict[str, Any]:
    """The same record, had its case failed its gate."""
    [case] = of["cases"]
    return {**of, "cases": [{**case, "rows": [], "passed": False, "failed": list(why)}]}


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


@pytest.mark.parametrize("part", ["processor", "capability", "processors"])
def test_machines_of_one_name_may_differ(part: str) -> None:
    one, other = record(triton=1.0), record(triton=1.0)
    one["machine"][part], other["machine"][part] = "fast", "slow"
    with pytest.raises(OpenVSAError, match="different machines cannot be compared: 'fast' and 'slow'"):
        changes(one, other)
    other["machine"].pop(part)  # a file of an older version
    assert changes(one, other)


@pytest.mark.parametrize(("part", "value"), [("pairs", 1020), ("shared_with_next", 0.6)])
def test_plans_of_one_name_may_differ(part: str, value: float) -> None:
    one, other = record(triton=1.0), record(triton=1.0)
    plan = {"pairs": 1000, "shared_with_next": 0.5}
    one["cases"][0]["plans"], other["cases"][0]["plans"] = {"model 1/8": plan}, {"model 1/8": {**plan, part: value}}
    with pytest.raises(OpenVSAError, match=rf"'model 1/8' of 's32k' is not one problem in both runs: {part}"):
        changes(one, other)
    other["cases"][0]["plans"]["model 1/8"][part] = plan[part] * 1.005
    assert changes(one, other)


@pytest.mark.parametrize("what", ["all", "backward"])
def test_what_cannot_run_any_more_is_found(what: str) -> None:
    before, after = record(triton=1.0, dense=1.0), record(cpu=1.0)
    row = before["cases"][0]["rows"][0]
    before["cases"][0]["rows"].append({**row, "pass": "backward"})
    left = {"contender": "triton", "pass": what, "reasons": ["no triton"], "plans": ["random 1/8"]}
    after["cases"][0]["left_out"] = [left, {**left, "contender": "dense", "plans": ["-"]}]
    assert newly_left_out(before, after) == {"s32k triton": ["no triton"]}
    assert newly_left_out(record(cpu=1.0), after) == {}
    after["cases"][0]["left_out"] = [{"what": "compiled steps", "reasons": ["slow"]}]
    assert newly_left_out(before, after) == {}


def test_versions_that_changed_are_named() -> None:
    one = {"versions": {"torch": "2.9", "triton": "3.6"}, "machine": {"driver": "580"}}
    other = {"versions": {"torch": "2.11", "triton": "3.6", "numpy": "2"}, "machine": {"driver": "590"}}
    assert versions_changed(one, one) == []
    assert versions_changed(one, other) == ["torch 2.9 before, 2.11 after", "driver 580 before, 590 after"]


def test_one_name_for_two_problems_is_refused() -> None:
    other = record(triton=1.0)
    other["cases"][0]["head_dim"] = 64
    with pytest.raises(OpenVSAError, match="'s32k' is not one problem in both runs: head_dim 128 and 64"):
        changes(record(triton=1.0), other)


def test_a_gate_that_fails_now_is_found() -> None:
    before = record(triton=1.0)
    after = failed(before, {"contender": "triton", "why": "out: rms error"})
    assert newly_failed(before, after) == {"s32k": ["triton: out: rms error"]}
    assert newly_failed(failed(before), failed(before, "not finite")) == {}
    assert newly_failed(before, failed(before, "not finite")) == {"s32k": ["not finite"]}
    assert [c.after for c in changes(before, after)] == [None]


def test_steps_of_whole_models() -> None:
    def steps(dense: float, sparse: float) -> dict[str, Any]:
        rows = [
            {"mode": "eager", "variant": "dense-cudnn", "density": None, "ms": dense},
            {"mode": "eager", "variant": "density 0.1", "density": 0.1, "ms": sparse},
        ]
        return {"machine": {"device": "GPU"}, "cases": [{"name": "wan", "rows": rows, "passed": True}]}

    found = changes(steps(4.0, 2.0), steps(8.0, 3.0))
    assert [(c.op, c.contender, c.what, c.ratio, c.is_slower(0.1)) for c in found] == [
        ("step", "dense-cudnn", "eager", 2.0, False),
        ("step", "density 0.1", "eager", 1.5, True),
    ]
