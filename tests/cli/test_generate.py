"""`openvsa generate` from the arguments to the files, around a small model with random weights."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from openvsa import models
from openvsa.cli import generate_pair
from openvsa.evaluate import Figures, read_video, report
from openvsa.models import ClipPipeline, FilmShots, PatchTokenizer, bundled_scenes, save_pipeline
from openvsa.models.shots import ShotTokens
from openvsa.select import BudgetTable

FILES = ["dense.mp4", "report.html", "report.json", "side_by_side.mp4", "sparse.mp4"]
WRONG = {
    "density-0": (["--density", "0"], r"the density, must be in \(0, 1\], got 0"),
    "density-2": (["--density", "2"], r"the density, must be in \(0, 1\], got 2"),
    "seed": (["--seed", "-1"], "--seed must be at least 0"),
    "device": (["--device", "toaster"], "--device must be cpu, cuda or cuda:N, got 'toaster'"),
    "other-device": (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    "absent-device": (["--device", "cuda:99"], "--device cuda:99: torch sees .* CUDA devices; use --device cpu"),
    "scene": (["--scene", "moon"], "there is no scene 'moon'; choose one of: squirrels, bird-song"),
    "both": (["--scene", "glide", "--image", "x.png"], "either --scene or --image"),
    "image": (["--image", "nowhere.png"], "cannot read the image 'nowhere.png'"),
    "out": (["--out", "/proc/nowhere"], "cannot write to the output folder '/proc/nowhere'"),
}


def small_pipeline() -> ClipPipeline:
    torch.manual_seed(0)
    components = 8
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * components,
        out_channels=components,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    return ClipPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        PatchTokenizer(num_components=components, num_time_cells=3),
        ShotTokens(FilmShots.bundled().num_rows, num_tokens=2, dim=8),
        scenes=bundled_scenes(),
        frame_size=(48, 80),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the small model in the place of the bundled one, and lists the number of steps of every generation."""
    made: list[int] = []
    generate = ClipPipeline.__call__

    def counted(self: ClipPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(kwargs["num_inference_steps"])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(models, "load_bundled", lambda *_: small_pipeline())
    monkeypatch.setattr(ClipPipeline, "__call__", counted)
    return made


def test_the_command_makes_both_clips_and_the_page(openvsa_command: Callable, calls: list[int], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    outcome = openvsa_command("generate", "--scene", "glide", "--density", 0.5, "--steps", 4, "--out", out)
    assert outcome.status == 0, outcome.err
    assert f"open {out}/report.html" in outcome.out
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert calls == [2, 2, 4, 4], "two untimed steps of each before the generations"
    assert read_video(out / "dense.mp4").shape == (6, 48, 80, 3)
    figures = Figures.from_json((out / "report.json").read_text())
    assert [layer.name for layer in figures.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert 0.5 <= figures.density < 1
    for time in (figures.dense, figures.sparse):
        assert 0 < time.attention_seconds < time.total_seconds
    assert figures.settings.scene == "A flying squirrel glides through the sky"
    assert figures.quality.psnr[0] == float("inf"), "both clips begin with the frame they were given"
    assert 'id="picture-data"' in (out / "report.html").read_text()


def test_the_command_on_the_page_makes_the_same_clips(
    openvsa_command: Callable, calls: list[int], tmp_path: Path
) -> None:
    openvsa_command("generate", "--seed", 3, "--steps", 2, "--out", tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in FILES if name.endswith("mp4")}
    settings = Figures.from_json((tmp_path / "report.json").read_text()).settings
    program, *arguments = shlex.split(settings.command)
    assert program == "openvsa"
    assert openvsa_command(*arguments).status == 0
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


def test_density_one_is_dense_attention(openvsa_command: Callable, calls: list[int], tmp_path: Path) -> None:
    openvsa_command("generate", "--density", 1, "--steps", 2, "--out", tmp_path)
    figures = Figures.from_json((tmp_path / "report.json").read_text())
    assert figures.density == 1.0
    assert figures.quality.mean_psnr > 55


def test_a_picture_of_ones_own(openvsa_command: Callable, calls: list[int], tmp_path: Path) -> None:
    picture = bundled_scenes()[0].image
    outcome = openvsa_command("generate", "--image", picture, "--steps", 1, "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    settings = Figures.from_json((tmp_path / "report.json").read_text()).settings
    assert settings.scene == picture.stem
    assert f"--image {picture}" in settings.command


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_reported_before_any_work(
    openvsa_command: Callable, calls: list[int], tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = openvsa_command("generate", *([] if "--out" in arguments else ["--out", tmp_path]), *arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert re.search(message, outcome.err)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_scene_makes_no_folder(openvsa_command: Callable, calls: list[int], tmp_path: Path) -> None:
    assert openvsa_command("generate", "--scene", "moon", "--out", tmp_path / "new").status == 2
    assert not (tmp_path / "new").exists()


def test_a_model_of_ones_own(openvsa_command: Callable, calls: list[int], tmp_path: Path) -> None:
    """What `openvsa train` writes, and not the bundled model, makes the clips; the page's command makes them again."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    pipe = small_pipeline()
    pipe.scenes = ()
    pipe.shot_tokens = ShotTokens(num_rows=20, num_tokens=2, dim=8)
    save_pipeline(pipe, mine, {})
    outcome = openvsa_command("generate", "--model", mine, "--steps", 1, "--out", out)
    assert outcome.status == 0, outcome.err
    settings = Figures.from_json((out / "report.json").read_text()).settings
    assert settings.model == str(mine)
    assert shlex.split(settings.command)[:6] == ["openvsa", "generate", "--model", str(mine), "--scene", "bird-song"]
    assert f"<dd>{mine}</dd>" in (out / "report.html").read_text()
    assert openvsa_command(*shlex.split(settings.command)[1:]).status == 0
    made = len(calls)
    outcome = openvsa_command("generate", "--model", mine, "--scene", "squirrels", "--out", out)
    assert re.search("there is no scene 'squirrels'; choose one of: bird-song", outcome.err)
    outcome = openvsa_command("generate", "--model", mine, "--prompt", "a fox", "--out", out)
    assert outcome.err == "error: --prompt: a model of openvsa train takes none; give a pipeline with --model\n"
    assert len(calls) == made


def test_a_table_of_another_model_is_refused_before_any_work(
    openvsa_command: Callable, calls: list[int], tmp_path: Path
) -> None:
    table, out = tmp_path / "table.json", tmp_path / "out"
    for layers, message in (
        ({"blocks.0.attn1": (0.5,) * 3, "blocks.1.attn1": (0.5,) * 3}, "blocks.0.attn1 has 2 heads, .* 3 densities"),
        ({"blocks.7.attn1": (0.5, 0.5)}, "blocks.7.attn1"),
    ):
        BudgetTable(0.5, layers).save(table)
        outcome = openvsa_command("generate", "--config", table, "--out", out)
        assert outcome.status == 2
        assert re.search(message, outcome.err)
        assert calls == []
        assert list(out.iterdir()) == []


def test_damaged_weights_are_reported_before_any_work(
    openvsa_command: Callable, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> ClipPipeline:
        return models.load_pipeline(tmp_path / "no weights here")

    monkeypatch.setattr(models, "load_bundled", damaged)
    outcome = openvsa_command("generate", "--out", tmp_path)
    assert outcome.status == 2
    assert outcome.err.startswith("error: there is no model in")
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("owner", "name", "on_call"),
    [(FlowMatchEulerDiscreteScheduler, "step", 3), (report, "write_video", 2), (report, "render_page", 1)],
    ids=["in-a-clip", "writing-a-video", "writing-the-page"],
)
def test_ctrl_c_stops_cleanly(
    openvsa_command: Callable,
    calls: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    on_call: int,
) -> None:
    original, count = getattr(owner, name), itertools.count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == on_call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    outcome = openvsa_command("generate", "--steps", 3, "--out", tmp_path)
    assert (outcome.status, outcome.err) == (130, "stopped\n")
    assert next(count) > on_call
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("load", "said"), [(0.5, False), (100.0, True)])
def test_a_busy_processor_is_said(
    openvsa_command: Callable,
    calls: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: float,
    said: bool,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    outcome = openvsa_command("generate", "--steps", "2", "--density", "0.5", "--out", tmp_path / "out")
    assert outcome.status == 0
    assert ("Other programs kept the processor busy (load 100.0" in outcome.out) == said


@pytest.mark.parametrize(
    ("threads", "spins", "said"), [(1, "", ""), (2, "3000", "attention."), (2, "", "environment.")]
)
def test_what_a_busy_processor_calls_for(monkeypatch: pytest.MonkeyPatch, threads: int, spins: str, said: str) -> None:
    """One thread waits for no other, and who has bounded the spinning, as `make demo` does, is not told to."""
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if spins:
        monkeypatch.setenv("GOMP_SPINCOUNT", spins)
    note = generate_pair.busy()
    assert note.endswith(said)
    assert bool(note) == bool(said)
