import json

import pytest
import torch

import openvsa
from openvsa.models import bundled, bundled_scenes, load_pipeline, save_pipeline
from openvsa.models.scenes import FilmShots, read_image
from openvsa.models.shots import ShotTokens


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    save_pipeline(tiny_pipeline, tmp_path / "model", {"steps": 1})
    return tmp_path / "model"


def weights(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_saved_and_loaded_it_makes_nearly_the_same_clip(tiny_pipeline, saved):
    loaded = load_pipeline(saved)
    assert loaded.transformer.dtype == torch.float32
    assert (loaded.frame_size, loaded.fps) == (tiny_pipeline.frame_size, tiny_pipeline.fps)
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    clips = [pipe(scene="glide", num_inference_steps=2).float() for pipe in (tiny_pipeline, loaded)]
    # The weights were rounded to bf16 in between.
    assert (clips[0] - clips[1]).abs().mean() < 3


def test_a_model_of_few_shots_has_no_scenes_of_others(tiny_pipeline, tmp_path):
    tiny_pipeline.shot_tokens = ShotTokens(num_rows=7)
    save_pipeline(tiny_pipeline, tmp_path / "model", {})
    pipe = load_pipeline(tmp_path / "model")
    assert [scene.name for scene in pipe.scenes] == ["bird-song", "bunny-wakes", "flight", "caught", "flutter-by"]
    for scene in pipe.scenes:
        assert pipe(scene=scene.name, num_inference_steps=1).shape == (4, 16, 32, 3)
    with pytest.raises(openvsa.OpenVSAError, match="no scene 'squirrels'; choose one of: bird-song, bunny-wakes"):
        pipe(scene="squirrels")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_weights_are_named(saved, damage, monkeypatch):
    path = weights(saved)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(openvsa.OpenVSAError, match=r"(missing|damaged)[\s\S]*Copy it again") as caught:
        load_pipeline(saved)
    assert str(path) in str(caught.value)
    monkeypatch.setattr(bundled, "WEIGHTS_FOLDER", saved)
    with pytest.raises(openvsa.OpenVSAError, match=r"(missing|damaged)[\s\S]*Install the package again"):
        bundled.load_bundled()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_bad_manifest_is_named(saved, content):
    (saved / "manifest.json").write_text(content)
    with pytest.raises(openvsa.OpenVSAError, match=r"manifest.json' cannot be read"):
        load_pipeline(saved)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(openvsa.OpenVSAError, match="there is no model in"):
        load_pipeline(tmp_path)


def test_scenes_are_whole_and_on_the_right_side_of_the_split():
    shots = FilmShots.bundled()
    scenes = bundled_scenes()
    assert len({scene.name for scene in scenes}) == len(scenes)
    assert {scene.held_out for scene in scenes} == {False, True}
    for scene in scenes:
        assert shots.cuts[scene.shot] <= scene.start < shots.cuts[scene.shot + 1] - 46
        assert scene.held_out == (scene.start >= shots.cuts[shots.held_out_from])
        assert scene.row < shots.num_rows
        assert scene.start_frame((144, 256)).shape == (144, 256, 3)
    folder = scenes[0].image.parent
    assert "Blender Foundation" in (folder / "NOTICE").read_text()
    assert json.loads((folder / "shots.json").read_text())["cuts"] == sorted(shots.cuts)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(openvsa.OpenVSAError, match=r"x\.png"):
        read_image(tmp_path / "x.png", (8, 8))
