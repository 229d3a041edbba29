"""`openvsa bench --model` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openvsa.bench import model_run
from openvsa.cli import bench_models


def test_measure(openvsa_command: Callable, tmp_path: Path) -> None:
    outcome = openvsa_command(
        "bench", "--device", "cpu", "--model", "tiny-wan", "--density", "0.5", "--profile", "--out", tmp_path
    )
    assert outcome.status == 0, outcome
    [file] = tmp_path.iterdir()
    assert f"wrote {file}" in outcome.out
    assert "eager, density 0.5: " in outcome.out
    [case] = json.loads(file.read_text())["cases"]
    assert case["passed"]
    for row in case["rows"]:
        assert f"{row['ms']:.3f}" in outcome.out


def test_a_failed_gate_is_said_and_is_the_status(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = iter([1e-9, 1.0, 1.0])  # another dense kernel, density 1, density 0.5
    monkeypatch.setattr(model_run, "_change", lambda out, of: next(changes))
    outcome = openvsa_command("bench", "--device", "cpu", "--model", "tiny-wan", "--density", "0.5")
    assert outcome.status == 1
    assert "FAILED: at density 1 the output differs" in outcome.out


def test_what_is_left_out_is_said(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, _ = model_run.dense_kernels("cpu")
    monkeypatch.setattr(model_run, "dense_kernels", lambda kind: (kernels, {"fa4": ("cannot be imported [x]",)}))
    outcome = openvsa_command("bench", "--device", "cpu", "--model", "tiny-wan", "--density", "0.5")
    assert outcome.status == 0
    assert "  without dense-fa4: cannot be imported [x]" in outcome.out


def test_a_model_too_large_for_memory_is_said(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(model_run, "measure_model", large)
    outcome = openvsa_command("bench", "--device", "cpu", "--model", "tiny-wan")
    assert outcome.status == 1
    assert "tiny-wan FAILED: tried to allocate 80 GiB" in outcome.out


def test_values_come_with_commas_or_one_by_one(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bench_models, "run_bench_models", lambda **options: asked.append(options) or 0)
    for words in (("--density", "0.5, 0.25"), ("--density", "0.5", "--density", "0.25")):
        models = ("--model", "a", "--model", "b,c", "--mode", "eager", "--mode", "compiled")
        assert openvsa_command("bench", *models, *words).status == 0
        assert asked[-1]["models"] == ["a", "b", "c"]
        assert asked[-1]["options"] == model_run.ModelOptions(densities=(0.5, 0.25), modes=("eager", "compiled"))
    assert openvsa_command("bench", "--model", "a", "--q-tiles", "1,2,1").status == 0
    assert asked[-1]["options"] == model_run.ModelOptions(q_tiles=(1, 2, 1))
    assert openvsa_command("bench", "--model", "a").status == 0
    assert asked[-1]["options"] == model_run.ModelOptions()


def test_models_are_listed(openvsa_command: Callable) -> None:
    outcome = openvsa_command("bench", "--list", "--device", "cpu")
    assert outcome.status == 0
    for name in ("wan-14b-720p", "hunyuan-720p", "tiny-wan"):
        assert name in outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x"], "there is no model case 'x'"),
        (["--model", "tiny-wan", "--density", "much"], "--density must be numbers"),
        (["--model", "tiny-wan", "--density", "2"], "must be in (0, 1], got 2"),
        (["--model", "tiny-wan", "--case", "small"], "--model takes models by name"),
        (["--model", "tiny-wan", "--mode", "fast"], "modes are eager and compiled, got fast"),
        (["--model", "tiny-wan", "--q-tiles", "1,0,1"], "--q-tiles must be whole numbers from 1 on"),
        (["--model", "tiny-wan", "--q-tiles", "1,2"], "an entry for each axis of tiny-wan"),
        (["--q-tiles", "1,2,1"], "--q-tiles: for whole models only"),
        (["--profile"], "--profile: for whole models only"),
        (["--density", "0.5", "--mode", "eager"], "--density, --mode: for whole models only"),
    ],
)
def test_mistakes_are_named(openvsa_command: Callable, arguments: list[str], said: str) -> None:
    outcome = openvsa_command("bench", "--device", "cpu", *arguments)
    assert outcome.status == 2
    assert said in outcome.err
