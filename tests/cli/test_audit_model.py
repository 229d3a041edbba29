"""`openvsa audit` of a Diffusers pipeline in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from PIL import Image

import tiny_pipelines
from openvsa.evaluate.audit_figures import AuditFigures
from openvsa.integrations.branch import add_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.select import BudgetTable

SMALL = ["--prompt", "a cat plays the piano", "--steps", 2, "--at", "1", "--height", 48, "--width", 64, "--frames", 5]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.wan(tmp_path_factory.mktemp("wan"))


def test_a_diffusers_pipeline(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = [*SMALL, "--density", 0.5, "--by", "layer", "--budget", table, "--out", tmp_path / "out"]
    outcome = openvsa_command("audit", wan, "--guidance-scale", 1, *options)
    assert outcome.status == 0, outcome.err
    figures = AuditFigures.from_json((tmp_path / "out" / "audit.json").read_text())
    assert "--guidance-scale 1.0" in figures.settings.command
    assert (figures.settings.model, figures.settings.subject) == (wan.name, "a cat plays the piano")
    assert list(figures.layers.values()) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert list(figures.steps) == [1]
    assert len(figures.sparse.quality.psnr) == 5
    assert BudgetTable.load(table).layers.keys() == set(figures.layers.values())


def test_weights_that_were_trained_with_vsa(openvsa_command: Callable, tmp_path: Path) -> None:
    model = tiny_pipelines.wan(tmp_path / "model")
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer")
    add_branch(transformer)
    transformer.save_pretrained(model / "transformer")
    outcome = openvsa_command("audit", model, *SMALL, "--config", "vsa-1.3b", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    figures = AuditFigures.from_json((tmp_path / "out" / "audit.json").read_text())
    assert figures.settings.branch
    assert figures.settings.config == SparsityConfig.preset("vsa-1.3b", min_tokens=0)
    assert figures.settings.density == pytest.approx(0.2)


def test_a_pipeline_that_continues_a_picture(openvsa_command: Callable, tmp_path: Path) -> None:
    model, picture = tiny_pipelines.wan_from_picture(tmp_path / "model"), tmp_path / "start.png"
    Image.new("RGB", (64, 48), (90, 20, 60)).save(picture)
    outcome = openvsa_command("audit", model, *SMALL, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "continues a picture: give one with --image" in outcome.err
    outcome = openvsa_command("audit", model, *SMALL, "--image", picture, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err


def test_what_the_pipeline_itself_refuses_is_one_message(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    size = ["--prompt", "a cat", "--height", 81, "--width", 128, "--frames", 5, "--steps", 2]
    outcome = openvsa_command("audit", wan, *size, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "WanPipeline refuses what it was given: `height` and `width` have to be divisible by 16" in outcome.err


def test_a_scene_is_not_for_a_pipeline(openvsa_command: Callable, wan: Path, tmp_path: Path) -> None:
    outcome = openvsa_command("audit", wan, *SMALL, "--scene", "glide", "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "--scene is for the bundled model" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_no_supported_family(openvsa_command: Callable, tmp_path: Path) -> None:
    """Refused by its class, before any weights are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"_class_name": "CosmosTextToWorldPipeline", "transformer": ["diffusers", "Nothing3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    outcome = openvsa_command("audit", folder, *SMALL, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "supported transformers:" in outcome.err
