"""openvsa convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense.safetensors"
    tensors = {f"blocks.0.attn1.to_q.{part}": torch.ones(shape) for part, shape in (("weight", (4, 4)), ("bias", (4,)))}
    save_file(tensors, path)
    return path


def test_dense_to_vsa_and_back(openvsa_command: Callable, dense: Path, tmp_path: Path) -> None:
    vsa, back = tmp_path / "vsa.safetensors", tmp_path / "back.safetensors"
    outcome = openvsa_command("convert", dense, vsa, "--to", "fastvideo", "--branch", "zero")
    assert outcome == (
        0,
        "converting dense.safetensors (1 of 1)\n"
        f"wrote {vsa}: 4 tensors, 0 under a new name\n"
        "added zero branch weights to 1 blocks: the model computes what it did\n",
        "",
    )
    assert "blocks.0.to_gate_compress.weight" in load_file(vsa)
    assert "2 under a new name" in openvsa_command("convert", vsa, tmp_path / "beside.safetensors").out

    outcome = openvsa_command("convert", vsa, back, "--branch", "drop")
    assert "dropped the branch weights of 1 blocks" in outcome.out
    assert "the result has no branch weights" in outcome.out
    assert load_file(back).keys() == load_file(dense).keys()


def test_a_refused_checkpoint_is_one_message(openvsa_command: Callable, tmp_path: Path) -> None:
    save_file({"decoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    outcome = openvsa_command("convert", tmp_path / "other.safetensors", tmp_path / "out.safetensors")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == (
        "error: 1 of 1 names are not those of a Wan transformer for text or image to video: decoder.weight\n"
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_names_of_options_are_checked(openvsa_command: Callable, dense: Path, tmp_path: Path) -> None:
    outcome = openvsa_command("convert", dense, tmp_path / "out.safetensors", "--to", "comfy")
    assert outcome.status == 2
    assert "got 'comfy'" in outcome.err


def test_a_target_below_a_file_is_one_message(openvsa_command: Callable, dense: Path) -> None:
    outcome = openvsa_command("convert", dense, dense / "out.safetensors")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {dense / 'out.safetensors'} cannot be written: ")


def test_zero_branch_weights_replace_no_trained_ones(openvsa_command: Callable, dense: Path, tmp_path: Path) -> None:
    vsa = tmp_path / "vsa.safetensors"
    openvsa_command("convert", dense, vsa, "--branch", "zero")
    outcome = openvsa_command("convert", vsa, tmp_path / "out.safetensors", "--branch", "zero")
    assert (outcome.status, outcome.out) == (2, "")
    assert "has branch weights already" in outcome.err
