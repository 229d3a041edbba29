"""`openvsa bench` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench_cases import SMALL
from openvsa.bench import cases
from openvsa.bench.cases import CASES
from openvsa.cli import bench


@pytest.fixture(autouse=True)
def small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, "small", SMALL)


def test_measure_and_compare(openvsa_command: Callable, tmp_path: Path) -> None:
    arguments = ["bench", "--device", "cpu", "--case", "small", "--contenders", "cpu,dense-cudnn"]
    outcome = openvsa_command(*arguments, "--commit", "abc", "--out", tmp_path)
    assert outcome.status == 1, outcome
    assert "without dense-cudnn" in outcome.out
    assert "asked for, but measured in no case: dense-cudnn" in outcome.out
    [file] = tmp_path.iterdir()
    assert f"wrote {file}" in outcome.out
    record = json.loads(file.read_text())
    assert record["commit"] == "abc"
    assert record["command"].startswith("openvsa bench --device cpu")

    assert openvsa_command("bench", "--compare", file, file).status == 0
    slower = tmp_path / "slower.json"
    for row in record["cases"][0]["rows"]:
        row["ms"] *= 1.2
    slower.write_text(json.dumps(record))
    outcome = openvsa_command("bench", "--compare", file, slower)
    assert outcome.status == 1
    assert "6 of ours slower" in outcome.out
    assert openvsa_command("bench", "--compare", slower, file).status == 0
    assert openvsa_command("bench", "--compare", file, slower, "--threshold", "0.3").status == 0


def test_compare_says_what_fails_and_what_is_gone(openvsa_command: Callable, tmp_path: Path) -> None:
    arguments = ["bench", "--device", "cpu", "--case", "small", "--contenders", "cpu,dense-flash"]
    assert openvsa_command(*arguments, "--out", tmp_path).status == 0
    [file] = tmp_path.iterdir()
    record = json.loads(file.read_text())
    [case] = record["cases"]
    fails = tmp_path / "fails.json"
    failure = {"contender": "cpu", "why": "dq: wrong"}
    fails.write_text(json.dumps({**record, "cases": [{**case, "rows": [], "passed": False, "failed": [failure]}]}))
    outcome = openvsa_command("bench", "--compare", file, fails)
    assert outcome.status == 1
    assert "small fails its correctness gate now: cpu: dq: wrong" in outcome.out
    gone = tmp_path / "gone.json"
    rows = [row for row in case["rows"] if row["contender"] != "cpu"]
    gone.write_text(json.dumps({**record, "cases": [{**case, "rows": rows}]}))
    assert f"only in {file.name}: small cpu\n" in openvsa_command("bench", "--compare", file, gone).out


def test_a_failed_gate_is_said_and_is_the_status(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from openvsa.bench import gate

    vsa = gate.video_sparse_attention
    monkeypatch.setattr(gate, "video_sparse_attention", lambda *a, **k: vsa(*a, **k) * 1.01)
    outcome = openvsa_command("bench", "--device", "cpu", "--case", "small", "--contenders", "cpu")
    assert outcome.status == 1
    assert "gate FAILED: cpu: whole op" in outcome.out
    assert "not timed, because the correctness gate failed: small" in outcome.out
    assert "TFLOP/s" not in outcome.out


def test_list_names_everything(openvsa_command: Callable) -> None:
    outcome = openvsa_command("bench", "--list")
    assert outcome.status == 0
    for name in (*CASES, "quick", "flagship", "dense-fa4", "fastvideo", "cpu"):
        assert name in outcome.out


def test_list_shows_a_remedy_whole(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its brackets are none of Rich's marks."""
    monkeypatch.setattr(bench, "_reasons", lambda *about: ["pip install 'a[b]'"])
    assert "pip install 'a[b]'" in openvsa_command("bench", "--list").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "small,nope"], "no case 'nope'"),
        (["--suite", "slow"], "no suite 'slow'"),
        (["--contenders", "cpu,nope"], "no contender 'nope'"),
        (["--case", "s32k"], "measured on cuda, not on cpu"),
        (["--compare", "a.json", "b.json"], "'a.json' cannot be read"),
    ],
)
def test_wrong_arguments(openvsa_command: Callable, arguments: list[str], message: str) -> None:
    outcome = openvsa_command("bench", "--device", "cpu", *arguments)
    assert outcome.status == 2
    assert message in outcome.err


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there(openvsa_command: Callable, device: str) -> None:
    outcome = openvsa_command("bench", "--device", device)
    assert outcome.status == 2
    assert "--device" in outcome.err
    assert device in outcome.err


def test_every_case_and_contender_of_repeated_options_counts(openvsa_command: Callable) -> None:
    for option in ("--case", "--contenders"):
        outcome = openvsa_command("bench", "--device", "cpu", option, "nope", option, "small")
        assert outcome.status == 2
        assert "'nope'" in outcome.err


def test_a_spent_budget_is_said(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvsa.bench.run as run_module

    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: float(next(clock)))
    outcome = openvsa_command("bench", "--device", "cpu", "--case", "small", "--contenders", "cpu", "--seconds", "1")
    assert outcome.status == 0
    assert "1 s are spent; not run: small" in outcome.out
