"""A run: its record, its budget, and that nothing wrong is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_cases import SMALL
from openvsa.bench import run as run_module
from openvsa.bench.contenders import Contender, contenders, find_contenders
from openvsa.bench.record import load
from openvsa.bench.run import run

CPU = torch.device("cpu")


def measure(*cases: Any, names: str = "cpu,dense-flash", **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"out": None, "command": "test", "commit": "abc", "case_seconds": 0.01} | options
    chosen = settings.pop("contenders", None) or find_contenders(names.split(","), "cpu")
    record, path = run(cases or (SMALL,), chosen, CPU, **settings)
    return record if path is None else load(path)


def test_every_pass_of_every_contender_is_there(tmp_path: Path) -> None:
    record = measure(out=tmp_path)
    [case] = record["cases"]
    assert case["passed"]
    timed = {(row["op"], row["contender"], row["plan"], row["pass"]) for row in case["rows"]}
    passes = ("forward", "backward", "both")
    assert timed == {
        *(("attention", "cpu", "random 1/4", p) for p in passes),
        *(("vsa", "cpu", "selected 1/4", p) for p in passes),
        *(("attention", "dense-flash", "-", p) for p in passes),
        ("matmul", "matmul", "-", "forward"),
    }
    for row in case["rows"]:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert row["rounds"] >= 2
        assert row["peak_bytes"] is None
    assert record["commit"] == "abc"
    assert record["versions"]["torch"] == torch.__version__
    assert case["clocks"] == {"before": None, "after": None}


def test_tflops_count_computed_pairs_and_ratios_are_to_dense() -> None:
    [case] = measure()["cases"]
    rows = {(row["op"], row["contender"], row["pass"]): row for row in case["rows"]}
    dense, sparse = rows["attention", "dense-flash", "backward"], rows["attention", "cpu", "backward"]
    tokens = 3 * 6 * 7
    assert dense["tflops"] == pytest.approx(2.5 * 4 * 16 * 2 * tokens**2 / dense["ms"] / 1e9)
    pairs = case["plans"]["random 1/4"]["pairs"]
    assert pairs < 2 * tokens**2 / 2
    assert sparse["tflops"] == pytest.approx(2.5 * 4 * 16 * pairs / sparse["ms"] / 1e9)
    assert sparse["of"]["dense-flash"] == pytest.approx(sparse["tflops"] / dense["tflops"])
    assert sparse["faster"]["dense-flash"] == pytest.approx(dense["ms"] / sparse["ms"])


def test_the_file_is_written_after_every_case(tmp_path: Path) -> None:
    seen = []

    def look(found: dict[str, Any]) -> None:
        [file] = tmp_path.iterdir()
        record = json.loads(file.read_text())
        seen.append(([case["name"] for case in record["cases"]], record["not_run"]))

    measure(SMALL, replace(SMALL, name="second"), out=tmp_path, on_case=look)
    assert seen == [(["small"], ["second"]), (["small", "second"], [])]


def test_a_case_too_large_for_memory_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    make = run_module._Problem

    def large(case: Any, device: torch.device) -> Any:
        if case.name == "large":
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return make(case, device)

    monkeypatch.setattr(run_module, "_Problem", large)
    first, second = measure(replace(SMALL, name="large"), SMALL, names="cpu")["cases"]
    assert not first["passed"]
    assert first["rows"] == []
    assert first["failed"] == [{"contender": "all", "why": "OutOfMemoryError: tried to allocate 80 GiB"}]
    assert second["passed"]


def test_a_spent_budget_stops_between_cases(tmp_path: Path) -> None:
    cases = [replace(SMALL, name=name) for name in "abc"]
    record = measure(*cases, seconds=1e-9, out=tmp_path)
    assert record["not_run"] == ["a", "b", "c"]
    assert record["cases"] == []
    assert measure(*cases[:1], seconds=1e9)["not_run"] == []


def test_nothing_is_timed_after_a_failed_gate(register: Callable) -> None:
    register(lambda out, lse: (out * 1.01, lse))
    [case] = measure(names="cpu,broken,dense-flash")["cases"]
    assert not case["passed"]
    assert case["rows"] == []
    assert {failure["contender"] for failure in case["failed"]} == {"broken"}


def test_a_backend_that_raises_has_failed(register: Callable) -> None:
    def fail(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("out of registers")

    register(fail)
    [case] = measure(names="broken")["cases"]
    assert not case["passed"]
    assert case["failed"] == [{"contender": "broken", "why": "RuntimeError: out of registers"}]


def test_only_the_timed_problem_can_be_wrong_too(register: Callable) -> None:
    """A kernel that errs on long sequences alone is stopped by the sampled blocks."""
    register(lambda out, lse: (out * (1.01 if out.shape[0] == 1 else 1), lse))
    [case] = measure(names="broken")["cases"]
    assert not case["passed"]
    assert any("random 1/4: out" in failure["why"] for failure in case["failed"])
    assert any("whole op: out" in failure["why"] for failure in case["failed"])


def peer(name: str, attend: Callable | None) -> Contender:
    def prepare(plan: object, case: object) -> Callable:
        if attend is None:
            raise AttributeError("no such function")
        return attend

    return Contender(name, "dense", "", lambda problem, case: [], prepare, heads_first=True)


def test_peers_that_fail_are_left_out_with_the_reason() -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 1.01

    chosen = [contenders()["cpu"], peer("wrong", wrong), peer("changed", None), contenders()["dense-cudnn"]]
    [case] = measure(contenders=chosen)["cases"]
    assert case["passed"]
    assert {row["contender"] for row in case["rows"]} == {"cpu", "matmul"}
    reasons = {left["contender"]: " ".join(left["reasons"]) for left in case["left_out"]}
    assert "out: rms error" in reasons["wrong"]
    assert "no such function" in reasons["changed"]
    assert "runs on a CUDA device" in reasons["dense-cudnn"]


def test_who_cannot_do_backward_is_timed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = contenders()["cpu"]
    forward_only = replace(cpu, reasons=lambda problem, case: ["no backward pass"] if problem.needs_grad else [])
    [case] = measure(contenders=[forward_only])["cases"]
    assert {row["pass"] for row in case["rows"]} == {"forward"}
    [left] = case["left_out"]
    assert (left["contender"], left["pass"], left["reasons"]) == ("cpu", "backward", ["no backward pass"])
    assert left["plans"] == ["random 1/4", "selected 1/4"]


def test_larger_query_blocks_and_text() -> None:
    [case] = measure(replace(SMALL, q_tiles=(1, 2, 1), prefix=40))["cases"]
    assert case["failed"] == []
    assert case["blocks"] == "48x32"
    assert {row["op"] for row in case["rows"]} == {"attention", "vsa", "matmul"}


def test_interleaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round runs every call once and begins with another one, after one round that does not count."""
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = run_module.time_interleaved(calls, CPU, 0.0)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert times["a"].rounds == 2
