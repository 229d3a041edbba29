"""Kandinsky 5, whose latents have their channels last and whose RoPE rounds to bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor

import family_checks as checks
import openvsa

GRID = (3, 4, 6)
ATOL = 2e-3
"""Its RoPE rounds queries and keys to bfloat16, so the last bit of an input may become much more."""


@pytest.fixture
def model() -> Kandinsky5Transformer3DModel:
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 8, 8),
    ).eval()
    # The modulations are made as zeros, which would switch every block off.
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(
    model: Kandinsky5Transformer3DModel, grid: tuple[int, ...], samples: tuple[int, ...] = (0, 1), **more: Any
) -> Tensor:
    with torch.no_grad():
        return model(**inputs(grid, samples) | more).sample


def inputs(grid: tuple[int, ...], samples: tuple[int, ...]) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": checks.randoms(samples, frames, 2 * height, 2 * width, 4),
        "encoder_hidden_states": checks.randoms(samples, 5, 16, salt=1),
        "pooled_projections": checks.randoms(samples, 8, salt=2),
        "timestep": torch.full((len(samples),), 700.0),
        "visual_rope_pos": [torch.arange(side) for side in grid],
        "text_rope_pos": torch.arange(5),
    }


def test_density_one_equals_dense_on_lattices_in_a_row(model: Kandinsky5Transformer3DModel) -> None:
    checks.check_density_one(model, run, [GRID, (1, 1, 1), (5, 3, 7), (1, 8, 8)], ATOL)


def test_detach_is_exact(model: Kandinsky5Transformer3DModel) -> None:
    checks.check_detach(model, run, (5, 7, 9))


def test_guidance_batched_and_split(model: Kandinsky5Transformer3DModel) -> None:
    checks.check_guidance(model, run, (5, 7, 9), ATOL)


def test_text_stays_dense(model: Kandinsky5Transformer3DModel) -> None:
    names = [f"visual_transformer_blocks.{index}.self_attention" for index in range(2)]
    checks.check_only_these_are_sparse(model, run, (5, 7, 9), names)


def test_contract_with_diffusers(model: Kandinsky5Transformer3DModel) -> None:
    forward = {"hidden_states", "encoder_hidden_states", "timestep", "sparse_params"}
    checks.check_contract(model, run, GRID, "Kandinsky5AttnProcessor", forward)


def test_tokens_change_their_order_once(model: Kandinsky5Transformer3DModel) -> None:
    checks.check_hoist(model, lambda: run(model, (5, 7, 9)), ATOL)


def test_its_own_sparsity_is_refused(model: Kandinsky5Transformer3DModel) -> None:
    params = {"to_fractal": True, "P": 0.9, "sta_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    with (
        openvsa.sparsify(model, density=0.5),
        pytest.raises(openvsa.UnsupportedError, match="block-sparse attention of its own"),
    ):
        run(model, (1, 8, 8), sparse_params=params)


@pytest.mark.parametrize("as_dict", [True, False])
def test_what_checkpointing_computes_again_is_about_its_own_forward(
    model: Kandinsky5Transformer3DModel, as_dict: bool
) -> None:
    """Without a dictionary the model returns the tensor itself, where others return a tuple."""
    model.train().enable_gradient_checkpointing()
    openvsa.sparsify(model, density=0.3, tile=(1, 2, 2))

    def gradient(*grids: tuple[int, ...]) -> Tensor:
        model.zero_grad()
        outs = [model(**inputs(grid, (0,)), return_dict=as_dict) for grid in grids]
        torch.stack([(out.sample if as_dict else out).square().mean() for out in outs]).sum().backward()
        return model.visual_transformer_blocks[0].self_attention.to_key.weight.grad.clone()

    grids = [(2, 5, 7), (2, 7, 5)]
    torch.testing.assert_close(gradient(*grids), sum(map(gradient, grids)))
