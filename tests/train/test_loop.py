import json

import pytest
import torch
from safetensors.torch import load_file

import openvsa
from openvsa.models import load_pipeline
from openvsa.train import run


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
