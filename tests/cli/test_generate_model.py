"""`openvsa generate --model` around a tiny Wan pipeline in a folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import openvsa
import tiny_pipelines
from openvsa import evaluate
from openvsa.cli import generate_model, pipelines
from openvsa.evaluate import Comparison, Figures, read_video
from openvsa.integrations.branch import add_branch
from openvsa.integrations.report import LayerReport, SparsityReport
from openvsa.select import BudgetTable

FILES = ["dense.mp4", "report.html", "report.json", "side_by_side.mp4", "sparse.mp4"]
PROMPT = "a cat plays the piano"
SMALL = ["--prompt", PROMPT, "--steps", 2, "--height", 96, "--width", 128, "--frames", 5]


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.wan(tmp_path_factory.mktemp("wan"))


def index(folder: Path, pipeline: str, **components: list[str]) -> Path:
    """A pipeline's index with no weights beside it: who looks for those too early fails."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **components}))
    return folder


def test_the_command_makes_both_clips_and_the_page(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = openvsa_command("generate", "--model", wan, *SMALL, "--density", 0.5, "--out", out)
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert read_video(out / "dense.mp4").shape == (5, 96, 128, 3)
    figures = Figures.from_json((out / "report.json").read_text())
    settings = figures.settings
    assert (settings.model, settings.scene, settings.fps, settings.credit) == (str(wan), PROMPT, 16.0, "")
    assert [layer.name for layer in figures.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert 0.5 <= figures.density < 1
    for time in (figures.dense, figures.sparse):
        assert 0 < time.attention_seconds < time.total_seconds
    page = (out / "report.html").read_text()
    assert 'id="picture-data"' in page
    assert f"<dt>model</dt><dd>{wan}</dd>" in page


def test_the_command_on_the_page_makes_the_same_clips(
    openvsa_command: Callable, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixel by pixel; an encoder with threads may write the same pixels as other bytes."""
    made: list[Comparison] = []

    def keep(comparison: Comparison, out: Path) -> Path:
        made.append(comparison)
        return out / "report.html"

    monkeypatch.setattr(evaluate, "write_report", keep)
    openvsa_command("generate", "--model", wan, *SMALL, "--seed", 3, "--fps", 8, "--out", tmp_path)
    settings = made[0].figures.settings
    program, *arguments = shlex.split(settings.command)
    assert (program, settings.fps) == ("openvsa", 8.0)
    assert openvsa_command(*arguments).status == 0
    assert torch.equal(made[0].dense_clip, made[1].dense_clip)
    assert torch.equal(made[0].sparse_clip, made[1].sparse_clip)
    assert made[1].figures.settings == settings


def test_settings_from_a_file_or_a_preset(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("budget: {top_k: 2}\ntile: [1, 2, 2]\ndense_first_steps: 1\nmin_tokens: 0\n")
    made = {}
    for name in (settings, "wan"):
        outcome = openvsa_command("generate", "--model", wan, *SMALL, "--config", name, "--out", tmp_path / "out")
        assert outcome.status == 0, outcome.err
        made[name] = Figures.from_json((tmp_path / "out" / "report.json").read_text())
        assert f"--config {name}" in made[name].settings.command
        assert "--density" not in made[name].settings.command
    tiles = 2 * 3 * 4  # of a lattice of 2 x 6 x 8
    assert made[settings].density == pytest.approx((1 + 2 / tiles) / 2)
    assert (made[settings].settings.density, made["wan"].settings.density) == (None, 0.25)
    assert "of the tiles were asked for and" in (tmp_path / "out" / "report.html").read_text()


def test_a_table_of_an_audit_as_settings(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    table = BudgetTable(0.5, {"blocks.0.attn1": (0.5, 1.0), "blocks.1.attn1": (0.25, 0.25)}, (1, 2, 2))
    table.save(tmp_path / "table.json")
    outcome = openvsa_command(
        "generate", "--model", wan, *SMALL, "--config", tmp_path / "table.json", "--out", tmp_path / "out"
    )
    assert outcome.status == 0, outcome.err
    figures = Figures.from_json((tmp_path / "out" / "report.json").read_text())
    assert figures.settings.density == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "wan", "--density", 0.5], "leave out --density, or --config"),
        (["--config", "nowhere.json"], "is no file, and no preset; presets are wan, "),
        (["--config", __file__], "cannot be parsed"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    openvsa_command: Callable, wan: Path, tmp_path: Path, options: list[Any], said: str
) -> None:
    outcome = openvsa_command("generate", "--model", wan, *SMALL, *options, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_what_the_pipeline_itself_refuses_is_one_message(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    size = ["--height", 81, "--width", 128, "--frames", 5, "--steps", 2]
    outcome = openvsa_command("generate", "--model", wan, "--prompt", PROMPT, *size, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "WanPipeline refuses what it was given: `height` and `width` have to be divisible by 16" in outcome.err
    assert "Traceback" not in outcome.err


def test_weights_that_were_trained_with_vsa_keep_their_branch(
    openvsa_command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers leaves it out. A name on the hub is a folder once it is downloaded."""
    model = tiny_pipelines.wan(tmp_path / "model")
    transformer = diffusers.WanTransformer3DModel.from_pretrained(model / "transformer")
    add_branch(transformer)
    torch.nn.init.normal_(transformer.blocks[1].attn1.to_gate_compress.weight)
    transformer.save_pretrained(model / "transformer")
    monkeypatch.setattr(diffusers.WanPipeline, "download", lambda name: {"someone/wan": str(model)}[name])
    for name in (str(model), "someone/wan"):
        pipe = pipelines.load(diffusers.WanPipeline, name, torch.device("cpu"))
        found = pipe.transformer.blocks[1].attn1.to_gate_compress.weight
        assert torch.equal(found, transformer.blocks[1].attn1.to_gate_compress.weight)
    outcome = openvsa_command("generate", "--model", model, *SMALL, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "transformer: trained with VSA" in outcome.out
    assert "(to all tiles, with the compressed branch)" in outcome.out
    assert Figures.from_json((tmp_path / "out" / "report.json").read_text()).branch
    assert "The weights have a compressed branch, and both clips have it" in (tmp_path / "out/report.html").read_text()


def test_all_tiles_and_the_branch_are_what_such_weights_are_compared_with(
    openvsa_command: Callable, tmp_path: Path
) -> None:
    model = tiny_pipelines.wan(tmp_path / "model")
    transformer = diffusers.WanTransformer3DModel.from_pretrained(model / "transformer")
    add_branch(transformer)
    for block in transformer.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight)
    transformer.save_pretrained(model / "transformer")
    outcome = openvsa_command("generate", "--model", model, *SMALL, "--density", 1, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert torch.equal(read_video(tmp_path / "out/dense.mp4"), read_video(tmp_path / "out/sparse.mp4"))


def test_what_the_authors_call_their_pipeline_is_known(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    """FastWan checkpoints name FastVideo's pipeline. They are distilled, so that guidance is none."""
    model = tmp_path / "model"
    shutil.copytree(wan, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    options = [*SMALL, "--guidance-scale", 1, "--out", tmp_path / "out"]
    outcome = openvsa_command("generate", "--model", model, *options)
    assert outcome.status == 0, outcome.err
    figures = Figures.from_json((tmp_path / "out" / "report.json").read_text())
    assert "--guidance-scale 1.0" in figures.settings.command


def test_what_stays_dense_is_on_the_page(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text('{"density": 0.5, "dense_layers": [0], "dense_first_steps": 1, "steps": {"1": 1.0}}')
    options = [*SMALL, "--steps", 3, "--config", settings, "--out", tmp_path / "out"]
    outcome = openvsa_command("generate", "--model", wan, *options)
    assert outcome.status == 0, outcome.err
    figures = Figures.from_json((tmp_path / "out" / "report.json").read_text())
    assert figures.why_dense == {
        "it is one of dense_layers": ["blocks.0.attn1"], "the density of step 1 is 1": ["blocks.1.attn1"],
    }  # fmt: skip
    assert openvsa.SparsityConfig.from_dict(figures.settings.sparsity).dense_first_steps == 1
    assert figures.kept_density == pytest.approx(0.5, abs=0.1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "it is one of dense_layers: 1 of 2 layers, <code>blocks.0.attn1</code>" in page
    assert "dense_first_steps" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"min_tokens": 100000},
            r"every layer stays dense \(min_tokens is 100000\), so that there is nothing to compare",
        ),
        ({"dense_first_steps": 1, "dense_last_steps": 1}, "all 2 steps stay dense .* give more --steps"),
        (
            {"steps": {"0": 1.0, "1": 1.0}},
            "all 2 steps stay dense .the density of step 0 is 1; the density of step 1 is 1.",
        ),
        ({"tile": [4, 4]}, "tile"),
        ({"backend": "hopper"}, "hopper"),
    ],
    ids=str,
)
def test_settings_that_do_not_suit_are_refused_before_the_clips(
    openvsa_command: Callable, wan: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"density": 0.5, **settings}))
    outcome = openvsa_command("generate", "--model", wan, *SMALL, "--config", file, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert re.search(said, outcome.err), outcome.err
    assert "full attention" not in outcome.out


def test_a_file_of_the_report_replaces_nothing_that_was_given(
    openvsa_command: Callable, wan: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    file.write_text('{"density": 0.5}')
    outcome = openvsa_command("generate", "--model", wan, *SMALL, "--config", file, "--out", tmp_path)
    assert (outcome.status, file.read_text()) == (2, '{"density": 0.5}')
    assert "would be replaced by a file of the report; give another --out" in outcome.err
    outcome = openvsa_command("generate", "--model", wan, *SMALL, "--out", tmp_path / "page.html")
    assert outcome.status == 2
    assert "--out is a folder for the page and the videos" in outcome.err


def test_without_a_terminal_every_part_has_its_line(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    outcome = openvsa_command("generate", "--model", wan, *SMALL, "--out", tmp_path / "out")
    parts = [line for line in outcome.out.splitlines() if line.endswith(" ...")]
    assert parts == ["warming up ...", "full attention ...", "sparse attention ...", "report ..."]


def test_a_schedule_that_cannot_have_one_step(openvsa_command: Callable, tmp_path: Path) -> None:
    """Mochi's, when everything is warmed up, and asked for."""
    model = tiny_pipelines.mochi(tmp_path / "model")
    sizes = ["--height", 64, "--width", 96, "--frames", 7]
    outcome = openvsa_command("generate", "--model", model, "--prompt", PROMPT, "--steps", 2, *sizes, "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    outcome = openvsa_command("generate", "--model", model, "--prompt", PROMPT, "--steps", 1, *sizes, "--out", tmp_path)
    assert outcome.status == 2
    assert outcome.err.endswith("error: a schedule of Mochi has at least 2 steps, got 1; give --steps\n")


def test_the_seed_makes_another_clip(wan: Path) -> None:
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    given = {"prompt": PROMPT, "height": 32, "width": 48, "num_frames": 5}
    one, again, two = (generate_model._Clips(pipe, given, seed, True)(1) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_steps_are_told_even_by_a_pipeline_without_a_callback(wan: Path) -> None:
    pipe = diffusers.WanPipeline.from_pretrained(wan)
    given = {"prompt": PROMPT, "height": 32, "width": 48, "num_frames": 5}
    for tells in (True, False):
        steps: list[int] = []
        generate_model._Clips(pipe, given, 0, tells)(3, lambda steps=steps: steps.append(1))
        assert len(steps) == 3


def test_the_first_video_or_image_of_an_output_is_the_clip() -> None:
    white = torch.ones(2, 3, 17, 20, 3).numpy()
    video = pipelines.clip_of(SimpleNamespace(frames=white))
    assert (video.shape, video.dtype, int(video.min())) == ((3, 16, 20, 3), torch.uint8, 255)
    assert pipelines.clip_of(SimpleNamespace(images=white[0])).shape == (1, 16, 20, 3)
    assert pipelines.clip_of(SimpleNamespace(image=white[0])).shape == (1, 16, 20, 3)
    with pytest.raises(openvsa.ShapeError, match=r"expected frames .* got \[17, 20, 3\]"):
        pipelines.clip_of(SimpleNamespace(frames=white[0]))
    with pytest.raises(openvsa.OpenVSAError, match="not finite numbers"):
        pipelines.clip_of(SimpleNamespace(frames=white * float("nan")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", 0], r"the density, must be in \(0, 1\], got 0"),
        (["--height", 0], "--height must be at least 1, got 0"),
        (["--fps", 0], "--fps must be above 0 and finite, got 0"),
        (["--fps", "nan"], "--fps must be above 0 and finite, got nan"),
        (["--fps", "inf"], "--fps must be above 0 and finite, got inf"),
        (["--guidance-scale", "nan"], "--guidance-scale must be at least 0 and finite, got nan"),
        (["--device", "toaster"], "--device must be cpu, cuda or cuda:N"),
        (["--image", "x.png"], "cannot read the image 'x.png'"),
        (["--scene", "glide"], "--scene is for the bundled model"),
        (["--out", "/proc/nowhere"], "cannot write to the output folder '/proc/nowhere'"),
    ],
)
def test_a_wrong_option_is_reported_before_the_weights_are_read(
    openvsa_command: Callable, tmp_path: Path, options: list[Any], message: str
) -> None:
    model = index(tmp_path / "model", "WanPipeline", transformer=["diffusers", "WanTransformer3DModel"])
    outcome = openvsa_command("generate", "--model", model, "--prompt", PROMPT, "--out", tmp_path / "out", *options)
    assert outcome.status == 2
    assert re.search(message, outcome.err), outcome.err
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pipeline", "transformer", "options", "message"),
    [
        ("StableDiffusionPipeline", None, [], "whose transformer is absent; supported transformers: .*Wan"),
        (
            "AllegroPipeline",
            "AllegroTransformer3DModel",
            [],
            "whose transformer is AllegroTransformer3DModel; supported",
        ),
        ("TomorrowPipeline", "WanTransformer3DModel", [], "is a TomorrowPipeline, which Diffusers .* does not have"),
        ("FluxPipeline", "FluxTransformer2DModel", ["--frames", 9], "FluxPipeline takes no num_frames: leave --frames"),
        ("WanImageToVideoPipeline", "WanTransformer3DModel", [], "continues a picture: give one with --image"),
        ("WanPipeline", "WanTransformer3DModel", [], "cannot load"),
    ],
)
def test_a_pipeline_that_does_not_suit_is_refused_by_its_index(
    openvsa_command: Callable, tmp_path: Path, pipeline: str, transformer: str | None, options: list[Any], message: str
) -> None:
    components = {"transformer": ["diffusers", transformer]} if transformer else {}
    model = index(tmp_path / "model", pipeline, **components)
    outcome = openvsa_command("generate", "--model", model, "--prompt", PROMPT, "--out", tmp_path / "out", *options)
    assert outcome.status == 2
    assert re.search(message, outcome.err), outcome.err


def test_no_pipeline_and_no_prompt_are_named(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    outcome = openvsa_command("generate", "--model", tmp_path, "--prompt", PROMPT, "--out", tmp_path / "out")
    assert (outcome.status, outcome.err.split(";")[0]) == (
        2,
        "error: the model must be a folder with a Diffusers pipeline or the name of one on the Hugging Face hub",
    )
    outcome = openvsa_command("generate", "--model", wan, "--out", tmp_path / "out")
    assert outcome == (2, "", "error: WanPipeline needs --prompt, the text to make a video of\n")


@pytest.mark.parametrize(
    ("layers", "blocks", "stored", "heads"), [(2, 10, 2, 1000), (30, 546, 6, 2), (40, 1500, 1, 1), (40, 9000, 0, 1)]
)
def test_the_picture_of_a_large_model_is_a_part_of_it(layers: int, blocks: int, stored: int, heads: int) -> None:
    """Of Wan 1.3B at 480p, 546 tiles, the page holds six layers and two heads; of a huge one it holds nothing."""
    report = SparsityReport(
        tuple(make_layer(layer, f"blocks.{layer}.attn1", blocks) for layer in range(layers)),
    )
    recorder = generate_model._recorder(50, report)
    assert len(recorder._chosen_layers or ()) == stored
    assert (recorder._max_heads or 0) >= heads
    assert recorder._max_heads == heads or layers == 2


def make_layer(layer: int, name: str, blocks: int) -> LayerReport:
    values = dict.fromkeys(LayerReport.__dataclass_fields__, 0)
    return LayerReport(**values | {"layer": layer, "name": name, "num_blocks": blocks})
