"""`openvsa audit` from the arguments to the files, around a small model with random weights."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

from openvsa import models
from openvsa.cli import generate_pair
from openvsa.evaluate.audit_figures import AuditFigures
from openvsa.integrations.config import SparsityConfig
from openvsa.models import ClipPipeline, FilmShots, PatchTokenizer, bundled_scenes, save_pipeline
from openvsa.models.shots import ShotTokens
from openvsa.select import BudgetTable

WRONG = {
    "density": (["--density", "0"], r"the density, must be in \(0, 1\], got 0"),
    "seed": (["--seed", "-1"], "--seed must be at least 0"),
    "at-word": (["--at", "first"], "--at takes steps with commas between, such as 1,4,6; got 'first'"),
    "at-late": (["--at", "0,2", "--steps", "2"], r"--at must name steps in 0\.\.1, got 0,2"),
    "at-again": (["--at", "0", "--at", "2", "--steps", "2"], r"--at must name steps in 0\.\.1, got 0,2"),
    "by": (["--by", "token"], "--by must be head or layer, got 'token'"),
    "device": (["--device", "toaster"], "--device must be cpu, cuda or cuda:N, got 'toaster'"),
    "scene": (["--scene", "moon"], "there is no scene 'moon'"),
    "prompt": (["--prompt", "a fox"], "prompt is for Diffusers pipelines; this model continues a scene"),
    "height": (["--height", "64"], "height is for Diffusers pipelines"),
    "out": (["--out", "/proc/nowhere"], "cannot write to the output folder '/proc/nowhere'"),
    "budget": (["--budget", "/proc/nowhere/table.json"], "cannot write to the output folder '/proc/nowhere'"),
    "config": (["--config", "moon"], "--config moon is no file, and no preset; presets are wan, "),
    "config-and-density": (["--config", "wan", "--density", "0.5"], "leave out --density, or --config"),
    # Even before a model is looked for.
    "config-at": (["no-such", "--config", "wan", "--at", "1,4"], r"step 1 stays dense \(dense_first_steps is 2\)"),
    "config-budget": (["no-such", "--config", "wan", "--budget", "t.json"], "would lose dense_first_steps"),
    "model": (["no-such-folder/at/all"], "no-such-folder/at/all"),
}


def small_pipeline(layers: int = 2) -> ClipPipeline:
    torch.manual_seed(0)
    components = 8
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=2 * components,
        out_channels=components, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    return ClipPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        PatchTokenizer(num_components=components, num_time_cells=3),
        ShotTokens(num_rows=FilmShots.bundled().num_rows, num_tokens=2, dim=8),
        scenes=bundled_scenes(),
        frame_size=(48, 80),
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the small model in the place of the bundled one, and lists the number of steps of every generation."""
    steps: list[int] = []
    generate = ClipPipeline.__call__

    def counted(self: ClipPipeline, *args, **kwargs) -> torch.Tensor:
        steps.append(kwargs["num_inference_steps"])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(models, "load_bundled", lambda *_: small_pipeline())
    monkeypatch.setattr(ClipPipeline, "__call__", counted)
    return steps


def test_an_audit_is_a_page_its_numbers_and_a_table(openvsa_command: Callable, made: list[int], tmp_path: Path) -> None:
    out, table = tmp_path / "new" / "folder", tmp_path / "tables" / "table.json"
    options = ["--scene", "glide", "--density", 0.5, "--steps", 3, "--at", "2,0", "--out", out, "--budget", table]
    outcome = openvsa_command("audit", *options)
    assert outcome.status == 0, outcome.err
    assert f"open {out}/audit.html" in outcome.out
    parts = ["warm-up (1)", "full attention (3)", "sparse forwards (2)", "layers (4)", "times (12)", "heads (8)"]
    parts += ["the table (3)", "sparse attention (3)", "with the table (3)"]
    assert outcome.out.splitlines()[: len(parts)] == [f"{part} ..." for part in parts], "no terminal: lines, no bars"
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json"]
    assert made == [2, 2, 3, 3, 2, 3], "untimed sparse; dense, sparse, with the table"
    figures = AuditFigures.from_json((out / "audit.json").read_text())
    assert figures.settings.model == "the bundled model"
    assert list(figures.steps) == [0, 2]
    assert figures.table == BudgetTable.load(table)
    program, *arguments = shlex.split(figures.settings.command)
    assert program == "openvsa"
    assert openvsa_command(*arguments).status == 0
    again = AuditFigures.from_json((out / "audit.json").read_text())
    assert (again.calls, again.sparse.quality) == (figures.calls, figures.sparse.quality), "the same numbers"


def test_without_a_table_and_without_options(
    openvsa_command: Callable, made: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate_pair, "busy", lambda: "Other programs kept the processor busy.")
    outcome = openvsa_command("audit")
    assert outcome.status == 0, outcome.err
    assert made == [2, 2, 8, 8]
    figures = AuditFigures.from_json(Path("audit/audit.json").read_text())
    assert list(figures.steps) == [1, 4, 6]
    assert figures.table is None
    assert "table" not in outcome.out
    assert outcome.out.endswith("Other programs kept the processor busy.\n"), "times on a CPU suffer from that"


def test_an_audit_of_a_preset(openvsa_command: Callable, made: list[int], tmp_path: Path) -> None:
    outcome = openvsa_command("audit", "--config", "wan", "--steps", 6, "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "dense      1 of 6 steps and 1 of 2 layers" in outcome.out
    assert made == [2, 2, 6, 6]
    figures = AuditFigures.from_json((tmp_path / "audit.json").read_text())
    assert list(figures.steps) == [1, 3, 5], "three of those that are sparse"
    assert figures.settings.density == 0.25
    assert figures.settings.config == SparsityConfig.preset("wan", steps=6, min_tokens=0)
    assert "--config wan" in figures.settings.command
    assert "--density" not in figures.settings.command
    assert openvsa_command(*shlex.split(figures.settings.command)[1:]).status == 0
    again = AuditFigures.from_json((tmp_path / "audit.json").read_text())
    assert (again.calls, again.dense_calls) == (figures.calls, figures.dense_calls), "the same numbers"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_tokens": 10**6},
            r"every layer stays dense .* \(min_tokens is 1000000\), so that there is nothing to audit",
        ),
        ({"dense_layers": [0, 1]}, r"every layer stays dense .* \(it is one of dense_layers\)"),
        ({"tile": [4, 4]}, "give a tile side for each axis"),
        ({"backend": "fa4"}, "fa4"),
    ],
    ids=["short", "dense-layers", "tile", "backend"],
)
def test_settings_that_cannot_run_are_refused_after_a_short_generation(
    openvsa_command: Callable, made: list[int], tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"density": 0.5, "min_tokens": 0} | settings))
    outcome = openvsa_command("audit", "--config", file, "--steps", 6, "--out", tmp_path)
    assert outcome.status == 2
    assert re.search(message, outcome.err), outcome.err
    assert made in ([2], []), "no whole generation"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_an_audit_of_a_file(openvsa_command: Callable, made: list[int], tmp_path: Path) -> None:
    """And a table of another audit is such a file."""
    table = BudgetTable(0.5, {"blocks.0.attn1": (0.25, 1.0), "blocks.1.attn1": (0.5, 0.5)}, (2, 4, 4))
    table.save(tmp_path / "table.json")
    config = SparsityConfig(density=0.5, tile=(2, 4, 4), q_tiles=(1, 2, 1), layers={"blocks.1.attn1": 0.25})
    config.save(tmp_path / "mine.yaml")
    kept = []
    for name in ("table.json", "mine.yaml"):
        outcome = openvsa_command("audit", "--config", tmp_path / name, "--steps", 2, "--out", tmp_path / "out")
        assert outcome.status == 0, outcome.err
        figures = AuditFigures.from_json((tmp_path / "out" / "audit.json").read_text())
        assert figures.settings.tile == (2, 4, 4)
        assert figures.settings.config == replace(SparsityConfig.load(tmp_path / name), min_tokens=0)
        kept.append(next(call.figures.density for call in figures.calls if call.layer == 1))
        assert "dense      " not in outcome.out
    assert kept == [(pytest.approx(0.5, abs=0.05),) * 2, (pytest.approx(0.25, abs=0.05),) * 2]


def test_a_page_of_another_name_and_a_picture_of_ones_own(
    openvsa_command: Callable, made: list[int], tmp_path: Path
) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "start.png"
    Image.new("RGB", (80, 48), (90, 20, 60)).save(picture)
    outcome = openvsa_command("audit", "--image", picture, "--steps", 1, "--out", page)
    assert outcome.status == 0, outcome.err
    assert f"open {page}" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "start.png"]
    figures = AuditFigures.from_json((tmp_path / "report.json").read_text())
    assert figures.settings.subject == "start"
    assert openvsa_command(*shlex.split(figures.settings.command)[1:]).status == 0


@pytest.mark.parametrize("budget", ["", "audit.html", "audit.json"])
def test_a_table_does_not_replace_the_audit(
    openvsa_command: Callable, made: list[int], tmp_path: Path, budget: str
) -> None:
    outcome = openvsa_command("audit", "--out", tmp_path, "--budget", tmp_path / budget)
    assert (outcome.status, made) == (2, [])
    assert "is a folder, or a file of the audit itself" in outcome.err


@pytest.mark.parametrize(
    ("options", "writer"),
    [
        (["--config", "mine.json", "--out", "mine.html"], "--out"),
        (["--config", "link.json", "--out", "mine.html"], "--out"),
        (["--config", "mine.json", "--budget", "./mine.json"], "--budget"),
        (["--image", "start.html", "--out", "start.html"], "--out"),
        (["--image", "start.html", "--budget", "folder/../start.html"], "--budget"),
    ],
)
def test_no_file_that_was_given_is_replaced(
    openvsa_command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], writer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_bundled", lambda *_: pytest.fail("the model is loaded already"))
    SparsityConfig(density=0.5, min_tokens=0).save("mine.json")
    Path("link.json").symlink_to("mine.json")
    Path("folder").mkdir()
    Image.new("RGB", (80, 48)).save("start.html", "PNG")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    outcome = openvsa_command("audit", *options)
    assert outcome.status == 2
    assert re.search(rf"the audit would write .* over the file of {options[0]} .*; give {writer} ", outcome.err)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_files_are_checked_before_the_model_is_loaded(
    openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_bundled", lambda *_: pytest.fail("the model is loaded already"))
    for option in (["--out", "/proc/nowhere"], ["--budget", "/proc/nowhere/table.json"]):
        assert "cannot write to the output folder '/proc/nowhere'" in openvsa_command("audit", *option).err


def test_a_model_of_ones_own(openvsa_command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pipeline(small_pipeline(layers=1), tmp_path / "mine", {})
    monkeypatch.chdir(tmp_path / "mine")
    outcome = openvsa_command("audit", ".", "--steps", 1, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    figures = AuditFigures.from_json((tmp_path / "out" / "audit.json").read_text())
    assert figures.settings.model == "mine"
    assert len(figures.layers) == 1


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_reported_before_any_work(
    openvsa_command: Callable, made: list[int], tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = openvsa_command("audit", *([] if "--out" in arguments else ["--out", tmp_path]), *arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert re.search(message, outcome.err)
    assert made == []
    assert list(tmp_path.iterdir()) == []
