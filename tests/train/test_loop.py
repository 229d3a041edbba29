import json
import resource

import pytest
import torch
from safetensors.torch import load_file

import openvsa
from openvsa.models import load_pipeline
from openvsa.train import loop, run


def test_the_loss_falls_and_a_model_is_left(config):
    result = run(config(steps=30, evaluate_every=30))
    assert result.finished
    assert result.steps == 30
    assert result.last["training"]["0.25"] < result.first["training"]["0.25"]
    lines = [json.loads(line) for line in (result.out / "curve.jsonl").read_text().splitlines()]
    assert lines == list(result.curve)
    pipe = load_pipeline(result.out / "model")
    assert pipe.frame_size == (32, 64)
    start = torch.zeros(32, 64, 3, dtype=torch.uint8)
    assert pipe(image=start, num_inference_steps=2).shape == (8, 32, 64, 3)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path):
    whole = run(config(checkpoint=tmp_path / "whole"))
    paused = run(config(checkpoint=tmp_path / "parts", pause_at=0.5))
    assert (paused.finished, paused.steps) == (False, 3)
    resumed = run(config(checkpoint=tmp_path / "parts", resume=True))
    assert resumed.last == whole.last
    expected, got = load_file(tmp_path / "whole"), load_file(tmp_path / "parts")
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_run_goes_on_with_its_seed(config, tmp_path):
    whole = run(config(checkpoint=tmp_path / "whole", seed=7))
    run(config(checkpoint=tmp_path / "parts", seed=7, pause_at=0.5))
    with pytest.raises(openvsa.OpenVSAError, match="of a run with seed 7, which it goes on with; got 8"):
        run(config(checkpoint=tmp_path / "parts", seed=8, resume=True))
    resumed = run(config(checkpoint=tmp_path / "parts", resume=True))
    assert resumed.last == whole.last
    assert json.loads((resumed.out / "model" / "manifest.json").read_text())["facts"]["recipe"]["seed"] == 7
    assert run(config()).last != whole.last


def test_a_run_stops_when_its_minutes_are_over(config):
    result = run(config(steps=None, minutes=0.02))
    assert result.finished
    assert result.seconds >= 1.2
    assert result.steps >= 1


def test_a_bad_checkpoint_is_named(config, tmp_path):
    (tmp_path / "bad").write_bytes(b"no checkpoint")
    with pytest.raises(openvsa.OpenVSAError, match="cannot read the checkpoint"):
        run(config(checkpoint=tmp_path / "bad", resume=True))
    run(config(checkpoint=tmp_path / "small", steps=1))
    with pytest.raises(openvsa.OpenVSAError, match="of another model"):
        run(config(checkpoint=tmp_path / "small", resume=True, num_layers=1))


def test_a_diverged_run_stops(config):
    with pytest.raises(openvsa.OpenVSAError, match="not a number"):
        run(config(matrix_lr=float("inf"), steps=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "toaster"}, "the device must be cpu, cuda or cuda:N, got 'toaster'"),
        ({"device": "cuda:99"}, r"the device cuda:99 is not there: torch sees \d+ CUDA devices"),
        ({"out": "file/out"}, "cannot write into the folder '.*file/out'"),
        ({"checkpoint": "file/last"}, "cannot write into the folder '.*file'"),
        ({"checkpoint": "."}, "the checkpoint must be a file"),
        (
            {"checkpoint": "file"},
            "the checkpoint '.*file' exists already, and a new run would overwrite it: .*--resume",
        ),
        ({"checkpoint": "none", "resume": True}, "there is no checkpoint '.*none' to resume"),
    ],
)
def test_what_cannot_work_is_said_before_the_film_is_read(config, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(loop, "read_film", lambda *args: pytest.fail("read the film"))
    (tmp_path / "file").write_text("")
    paths = {name: tmp_path / value for name, value in changes.items() if name in ("out", "checkpoint")}
    with pytest.raises(openvsa.OpenVSAError, match=message):
        run(config(**{**changes, **paths}))


def test_a_killed_run_leaves_no_lines_behind(config, tmp_path):
    """It had gone on after its last checkpoint, and was stopped while it wrote a line."""
    path = config().out / "curve.jsonl"
    run(config(checkpoint=tmp_path / "last", pause_at=0.5, log_every=1))
    kept = path.read_text()
    path.write_text(kept + '{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    resumed = run(config(checkpoint=tmp_path / "last", resume=True, log_every=1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [*map(json.loads, kept.splitlines()), *resumed.curve]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_said_and_spoils_nothing(config, tmp_path):
    run(config(checkpoint=tmp_path / "last", pause_at=0.5))
    before = (tmp_path / "last").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(openvsa.OpenVSAError, match=r"cannot write the checkpoint '.*last' after 4 steps"):
            run(config(checkpoint=tmp_path / "last", resume=True))
        with pytest.raises(openvsa.OpenVSAError, match="trained, but the model cannot be written into"):
            run(config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "last"}
