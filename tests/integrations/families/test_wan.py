"""Wan in its Diffusers forms: text and image to video, a timestep for each token, VACE, Animate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

import openvsa
from openvsa.integrations.report import AttentionEvent
from openvsa.layout import TileLayout

SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
}
TEXT = 512  # image-to-video takes the last 512 of its context for text


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_to_video() -> tuple[nn.Module, Any]:
    model = WanTransformer3DModel(in_channels=4, out_channels=4, **SIZES)

    def inputs(t: int, h: int, w: int, batch: int = 2) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 4, t, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 3, 16, seed=2),
        }

    return model, inputs


def timestep_of_every_token() -> tuple[nn.Module, Any]:
    model, plain = text_to_video()

    def inputs(t: int, h: int, w: int, batch: int = 2) -> dict[str, Any]:
        return {**plain(t, h, w, batch), "timestep": 500 * noise(batch, t * h * w, seed=3).abs()}

    return model, inputs


def image_to_video() -> tuple[nn.Module, Any]:
    model = WanTransformer3DModel(in_channels=8, out_channels=4, image_dim=12, added_kv_proj_dim=48, **SIZES)

    def inputs(t: int, h: int, w: int, batch: int = 2) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 8, t, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
            "encoder_hidden_states_image": noise(batch, 5, 12, seed=3),
        }

    return model, inputs


def vace() -> tuple[nn.Module, Any]:
    model = WanVACETransformer3DModel(in_channels=4, out_channels=4, vace_layers=[0, 2], vace_in_channels=6, **SIZES)
    for block in model.vace_blocks:  # born as zeros, so that a new model ignores its control
        nn.init.normal_(block.proj_out.weight, std=0.1)

    def inputs(t: int, h: int, w: int, batch: int = 2) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 4, t, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 3, 16, seed=2),
            "control_hidden_states": noise(batch, 6, t, 2 * h, 2 * w, seed=3),
        }

    return model, inputs


def animate() -> tuple[nn.Module, Any]:
    model = WanAnimateTransformer3DModel(
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        image_dim=12,
        added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=3,
        **SIZES,
    )

    def inputs(t: int, h: int, w: int, batch: int = 2) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 12, t, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
            "encoder_hidden_states_image": noise(batch, 5, 12, seed=3),
            "pose_hidden_states": noise(batch, 4, t - 1, 2 * h, 2 * w, seed=4),
            "face_pixel_values": noise(batch, 3, 4 * (t - 1), 16, 16, seed=5),
        }

    return model, inputs


MAKERS = {maker.__name__: maker for maker in (text_to_video, timestep_of_every_token, image_to_video, vace, animate)}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, inputs = MAKERS[request.param]()
    return model.eval(), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**{name: value.clone() for name, value in inputs.items()})[0]


def test_density_one_equals_dense_and_detach_is_exact(case: tuple[Any, Any]) -> None:
    model, inputs = case
    grids = [(3, 5, 7), (3, 4, 6), (3, 5, 7)]
    dense = [run(model, inputs(*grid)) for grid in grids]
    with openvsa.sparsify(model, density=1.0, tile=(2, 2, 4)) as handle:
        for grid, expected in zip(grids, dense, strict=True):
            torch.testing.assert_close(run(model, inputs(*grid)), expected, rtol=1e-4, atol=1e-5)
        assert {layer.calls for layer in handle.report().layers} == {3}
    with openvsa.sparsify(model, density=0.2, tile=(2, 2, 4)):
        assert not torch.allclose(run(model, inputs(*grids[0])), dense[0], atol=1e-5)
    assert torch.equal(run(model, inputs(*grids[0])), dense[0])
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 0


def test_every_self_attention_is_sparse_and_nothing_else(case: tuple[Any, Any]) -> None:
    model, inputs = case
    events: list[AttentionEvent] = []
    with openvsa.sparsify(model, density=0.3) as handle:
        handle.on_attention(events.append)
        run(model, inputs(3, 5, 7))
    expected = [f"blocks.{i}.attn1" for i in range(3)]
    if hasattr(model, "vace_blocks"):
        expected = ["vace_blocks.0.attn1", "vace_blocks.1.attn1", *expected]
    assert [event.name for event in events] == expected
    assert all(event.plan is not None and event.layout.grid == (3, 5, 7) for event in events)


def test_batched_and_split_guidance_agree(case: tuple[Any, Any]) -> None:
    model, inputs = case
    both = inputs(3, 4, 6, 2)
    halves = [{name: value[i : i + 1] for name, value in both.items()} for i in range(2)]
    with openvsa.sparsify(model, density=0.3, tile=(1, 2, 2)):
        torch.testing.assert_close(
            run(model, both), torch.cat([run(model, half) for half in halves]), rtol=1e-4, atol=1e-5
        )


def test_tokens_are_permuted_once_for_all_layers(case: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same plans, in the same arithmetic up to rounding, as layers that each permute for themselves."""
    model, inputs = case
    events: list[AttentionEvent] = []
    moves: list[int] = []

    def count(name: str) -> None:
        original = getattr(TileLayout, name)

        def counted(self: TileLayout, x: Tensor, dim: int = 1) -> Tensor:
            moves.append(x.dim())
            return original(self, x, dim)

        monkeypatch.setattr(TileLayout, name, counted)

    count("permute")
    count("unpermute")
    with openvsa.sparsify(model, density=0.3, tile=(1, 2, 4)) as handle:
        handle.on_attention(events.append)
        once = run(model, inputs(3, 5, 7))
        moved_once = len(moves)
        moves.clear()
        monkeypatch.setattr(handle._sites[0], "hoist", None)
        by_layer = run(model, inputs(3, 5, 7))
    torch.testing.assert_close(once, by_layer, rtol=1e-4, atol=1e-5)
    layers = len(events) // 2
    for mine, theirs in zip(events[:layers], events[layers:], strict=True):
        torch.testing.assert_close(mine.q, theirs.q, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine.plan.block_mask(), theirs.plan.block_mask())
    assert len(moves) == 4 * layers
    # Latents, two rotary tables, the way back; VACE's control, or a timestep for each token, are one more.
    extra = hasattr(model, "vace_blocks") or inputs(3, 5, 7)["timestep"].dim() == 2
    assert moved_once == (4 * layers if hasattr(model, "face_adapter") else 4 + extra)


def test_a_dense_forward_keeps_raster_order_bit_for_bit(case: tuple[Any, Any]) -> None:
    model, inputs = case
    dense = run(model, inputs(3, 4, 6))
    with openvsa.sparsify(model, config=openvsa.SparsityConfig(density=0.2, min_tokens=73)) as handle:
        assert torch.equal(run(model, inputs(3, 4, 6)), dense)
        assert handle.report().executed_density == 1.0
        assert not torch.equal(run(model, inputs(3, 5, 6)), dense)
        assert handle.report().executed_density < 1.0
