"""What is typed arrives where the work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openvsa import train
from openvsa.cli import generate, generate_model
from openvsa.errors import OpenVSAError


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run_generate` and `train.run` were called with, instead of the work."""
    calls: dict[str, Any] = {}
    monkeypatch.setattr(generate, "run_generate", lambda **options: calls.update(options))
    monkeypatch.setattr(generate_model, "run_generate_model", lambda **options: calls.update(options))
    monkeypatch.setattr(generate, "print_scenes", lambda: calls.update(printed=True))

    def run(config: train.TrainConfig) -> train.TrainResult:
        calls["config"] = config
        first, last = {"held_out": {"0.25": 1.0}}, {"held_out": {"0.25": 0.5}}
        return train.TrainResult(7, 90.0, True, first, last, (), config.out)

    monkeypatch.setattr(train, "run", run)
    return calls


def test_generate_defaults(openvsa_command: Callable, received: dict[str, Any]) -> None:
    assert openvsa_command("generate").status == 0
    assert received == {
        "model": None,
        "scene": None,
        "image": None,
        "density": None,
        "config": None,
        "seed": 0,
        "steps": 16,
        "device": "cpu",
        "out": Path("demo"),
    }


def test_generate_takes_every_option(openvsa_command: Callable, received: dict[str, Any]) -> None:
    options = "--image cat.png --density 0.5 --seed 3 --steps 4 --device cuda:1 --out there"
    assert openvsa_command("generate", *options.split()).status == 0
    assert received == {
        "model": None,
        "scene": None,
        "image": Path("cat.png"),
        "density": 0.5,
        "config": None,
        "seed": 3,
        "steps": 4,
        "device": "cuda:1",
        "out": Path("there"),
    }


def test_generate_with_a_model_takes_every_option(openvsa_command: Callable, received: dict[str, Any]) -> None:
    options = "--model there/wan --prompt cat --image cat.png --density 0.5 --steps 4 --height 32 --width 48"
    options += " --frames 9 --fps 8 --guidance-scale 1 --seed 3 --device cuda:1 --out there"
    assert openvsa_command("generate", *options.split()).status == 0
    assert received == {
        "model": "there/wan",
        "prompt": "cat",
        "image": Path("cat.png"),
        "density": 0.5,
        "config": None,
        "steps": 4,
        "height": 32,
        "width": 48,
        "frames": 9,
        "fps": 8.0,
        "guidance_scale": 1.0,
        "seed": 3,
        "device": "cuda:1",
        "out": Path("there"),
    }


def test_the_bundled_model_takes_no_prompt(openvsa_command: Callable, received: dict[str, Any]) -> None:
    outcome = openvsa_command("generate", "--prompt", "cat", "--width", 48)
    assert outcome.err == "error: --prompt, --width: the bundled model takes none; give a pipeline with --model\n"
    assert received == {}


def test_list_scenes_makes_nothing(openvsa_command: Callable, received: dict[str, Any]) -> None:
    assert openvsa_command("generate", "--list-scenes").status == 0
    assert received == {"printed": True}


def test_train_takes_every_option(openvsa_command: Callable, received: dict[str, Any]) -> None:
    options = "--preset miniature --film f.mp4 --steps 7 --checkpoint c.safetensors --resume --device cpu --out there"
    outcome = openvsa_command("train", *options.split(), "--seed", "5")
    assert outcome.status == 0
    assert outcome.out.splitlines() == [
        "loss on held-out shots at density 0.25: 1.0000 -> 0.5000",
        "7 steps in 1.5 minutes; the model is in there/model",
    ]
    config = received["config"]
    assert config.num_layers == train.preset("miniature", out=Path("x"), steps=1).num_layers
    assert (config.film, config.steps, config.minutes) == (Path("f.mp4"), 7, None)
    assert (config.checkpoint, config.resume, config.seed) == (Path("c.safetensors"), True, 5)
    assert (config.device, config.out) == ("cpu", Path("there"))


def test_the_recipe_has_a_length_of_its_own(openvsa_command: Callable, received: dict[str, Any]) -> None:
    assert openvsa_command("train").status == 0
    own = train.preset("miniature", out=Path("x"))
    assert (received["config"].steps, received["config"].minutes) == (own.steps, own.minutes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 1 --minutes 1", "give one of minutes and steps"),
        ("--steps 0", "longer than nothing"),
        ("--preset huge --steps 1", "there is no preset 'huge'"),
        ("--steps 1 --resume", "give the file of its checkpoint"),
        ("--seed -1", "seed must be in [0, 2**63), got -1"),
    ],
)
def test_train_refuses_before_any_work(
    openvsa_command: Callable, received: dict[str, Any], options: str, message: str
) -> None:
    outcome = openvsa_command("train", *options.split())
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert received == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --density abc", "'--density': it must be a number, got 'abc'"),
        ("generate --seed 1.5", "'--seed': it must be a whole number, got '1.5'"),
        ("generate --steps -1", "'--steps': it must be a whole number >= 1, got '-1'"),
        ("audit --query-blocks 0", "'--query-blocks': it must be a whole number >= 1, got '0'"),
        ("train --minutes long", "'--minutes': it must be a number, got 'long'"),
        ("bench --seconds 0.5", "'--seconds': it must be a number >= 1, got '0.5'"),
        ("bench --threshold nan", "'--threshold': it must be a number >= 0, got 'nan'"),
        ("doctor --tokens 0", "'--tokens': it must be a whole number >= 1, got '0'"),
    ],
)
def test_a_wrong_number_is_shown(openvsa_command: Callable, arguments: str, message: str) -> None:
    outcome = openvsa_command(*arguments.split())
    assert (outcome.status, outcome.out) == (2, "")
    assert message in " ".join(outcome.err.replace("│", " ").split())  # typer draws a frame around it


def test_an_error_of_the_work_is_one_message(
    openvsa_command: Callable, received: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise OpenVSAError("the weights are damaged")

    monkeypatch.setattr(generate, "run_generate", fail)
    assert openvsa_command("generate") == (2, "", "error: the weights are damaged\n")
