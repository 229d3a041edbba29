"""`openvsa bench --model` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openvsa.bench import model_run
from openvsa.cli import bench_models
from openvsa.integrations.config import SparsityConfig


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
        assert asked[-1]["options"] == model_run.ModelOptions(
            model_run.by_density((0.5, 0.25)), modes=("eager", "compiled")
        )
    assert openvsa_command("bench", "--model", "a").status == 0
    assert asked[-1]["options"] == model_run.ModelOptions()


def test_settings_come_from_a_preset_or_a_file(
    openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(bench_models, "run_bench_models", lambda **options: asked.append(options["options"]) or 0)
    assert openvsa_command("bench", "--model", "a", "--config", "vsa-1.3b").status == 0
    assert asked[-1].config == "vsa-1.3b"
    assert asked[-1].sparse == {"vsa-1.3b": SparsityConfig.preset("vsa-1.3b", min_tokens=0)}

    assert openvsa_command("bench", "--model", "a", "--config", "wan").status == 0
    assert asked[-1].sparse == {"wan": SparsityConfig(density=0.25, dense_layers=(0,), min_tokens=0)}

    file = tmp_path / "mine.yaml"
    file.write_text("density: 0.5\nq_tiles: [1, 2, 1]\ndense_last_steps: 2\nmin_tokens: 7\n")
    mine = SparsityConfig(density=0.5, q_tiles=(1, 2, 1), min_tokens=7)
    assert openvsa_command("bench", "--model", "a", "--config", file).status == 0
    assert asked[-1].sparse == {"mine": mine}
    assert openvsa_command("bench", "--model", "a", "--config", file, "--density", "0.25,0.1").status == 0
    assert asked[-1].sparse == {f"mine, density {share}": replace(mine, density=share) for share in (0.25, 0.1)}
    assert asked[-1].config == "mine"


def test_settings_are_measured(openvsa_command: Callable, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    SparsityConfig(density=0.5, q_tiles=(1, 2, 1)).save(file)
    outcome = openvsa_command("bench", "--device", "cpu", "--model", "tiny-wan", "--config", file)
    assert outcome.status == 0, outcome
    assert "query blocks of 1x2x1 tiles" in outcome.out
    assert "mine" in outcome.out


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
        (["--model", "tiny-wan", "--config", "none.yaml"], "--config none.yaml is no file, and no preset"),
        (["--model", "tiny-wan", "--config", "two-axes.yaml"], "an entry for each axis of tiny-wan"),
        (["--model", "tiny-wan", "--config", "table.yaml", "--density", "0.5"], "have densities by layer; leave out"),
        (["--model", "tiny-wan", "--config", "vsa-14b", "--density", "0.5"], "decides how many tiles are kept"),
        (["--config", "wan"], "--config: for whole models only"),
        (["--profile"], "--profile: for whole models only"),
        (["--density", "0.5", "--mode", "eager"], "--density, --mode: for whole models only"),
    ],
)
def test_mistakes_are_named(
    openvsa_command: Callable, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two-axes.yaml").write_text("density: 0.5\ntile: [2, 2]\n")
    Path("table.yaml").write_text("density: 0.5\nlayers: {blocks.0.attn1: 0.25}\n")
    outcome = openvsa_command("bench", "--device", "cpu", *arguments)
    assert outcome.status == 2
    assert said in outcome.err
