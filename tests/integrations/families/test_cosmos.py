"""Cosmos: text to world, video to world with noise levels per frame, and the image context of 2.5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from torch import Tensor

import family_checks as checks
import openvsa

GRID = (3, 4, 6)


def build(**config: Any) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (8, 32, 32),
        "concat_padding_mask": False,  # Diffusers resizes this mask with torchvision; it is one more input channel
    }
    return CosmosTransformer3DModel(**sizes | config).eval()


@pytest.fixture
def model() -> CosmosTransformer3DModel:
    return build()


def run(
    model: CosmosTransformer3DModel, grid: tuple[int, ...], samples: tuple[int, ...] = (0, 1), **more: Any
) -> Tensor:
    frames, height, width = grid
    given: dict[str, Any] = {
        "hidden_states": checks.randoms(samples, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((len(samples),), 0.7),
        "encoder_hidden_states": checks.randoms(samples, 5, 16, salt=1),
        "fps": 24,
    }
    with torch.no_grad():
        return model(**given | more)[0]


def noise_per_frame(grid: tuple[int, ...]) -> Tensor:
    """[B, 1, T, 1, 1]: the first frame is given and nearly clean."""
    timestep = torch.full((2, 1, grid[0], 1, 1), 0.7)
    timestep[:, :, 0] = 0.1
    return timestep


def test_density_one_equals_dense_on_lattices_in_a_row(model: CosmosTransformer3DModel) -> None:
    checks.check_density_one(model, run, [GRID, (1, 1, 1), (5, 3, 7), (2, 8, 8)])


def test_detach_is_exact(model: CosmosTransformer3DModel) -> None:
    checks.check_detach(model, run, (5, 7, 9))


def test_guidance_batched_and_split(model: CosmosTransformer3DModel) -> None:
    checks.check_guidance(model, run, (5, 7, 9))


def test_text_stays_dense(model: CosmosTransformer3DModel) -> None:
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    checks.check_only_these_are_sparse(model, run, (5, 7, 9), names)


def test_contract_with_diffusers(model: CosmosTransformer3DModel) -> None:
    forward = {"hidden_states", "encoder_hidden_states", "timestep"}
    checks.check_contract(model, run, GRID, "CosmosAttnProcessor2_0", forward)


def test_video_to_world(model: CosmosTransformer3DModel) -> None:
    """Frames that are given have another noise level; the step is that of the frames being made."""
    more = {"timestep": noise_per_frame(GRID)}
    dense = run(model, GRID, **more)
    with openvsa.sparsify(model, density=1.0):
        checks.close(run(model, GRID, **more), dense)
    with openvsa.sparsify(model, density=0.5) as handle:
        run(model, GRID, **more)
        assert not handle._session.forward.hoisted  # pyright: ignore[reportOptionalMemberAccess]
        run(model, GRID)
        assert handle._session.forward.hoisted  # pyright: ignore[reportOptionalMemberAccess]
    events = checks.events_of(model, lambda: run(model, GRID, **more), density=0.5)
    assert [event.timestep for event in events] == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("positions", ["learnable", None])
def test_tokens_change_their_order_once(positions: str | None) -> None:
    model = build(extra_pos_embed_type=positions)
    checks.check_hoist(model, lambda: run(model, (5, 7, 9)))


def test_residuals_of_the_control_network() -> None:
    """They come in raster order, and go in with the tokens."""
    model, grid = build(controlnet_block_every_n=1), (5, 7, 9)
    residuals = [checks.randoms((0, 1), 315, 48, salt=salt) for salt in (2, 3)]

    def run_controlled(model: CosmosTransformer3DModel, grid: tuple[int, ...]) -> Tensor:
        return run(model, grid, block_controlnet_hidden_states=residuals)

    assert not torch.allclose(run_controlled(model, grid), run(model, grid), atol=1e-3)
    checks.check_density_one(model, run_controlled, [grid])
    checks.check_hoist(model, lambda: run_controlled(model, grid))


def test_the_condition_mask_and_image_context_of_2_5() -> None:
    model = build(in_channels=5, img_context_dim_in=8, img_context_num_tokens=3, img_context_dim_out=48)
    text = checks.randoms((0, 1), 5, 16, salt=1)
    image = checks.randoms((0, 1), 3, 8, salt=2)

    def run_2_5(model: CosmosTransformer3DModel, grid: tuple[int, ...], **more: Any) -> Tensor:
        frames, height, width = grid
        mask = torch.zeros(2, 1, frames, 2 * height, 2 * width)
        return run(model, grid, condition_mask=mask, encoder_hidden_states=(text, image), **more)

    checks.check_density_one(model, run_2_5, [GRID, (5, 3, 7)])
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    checks.check_only_these_are_sparse(model, run_2_5, (5, 7, 9), names)
