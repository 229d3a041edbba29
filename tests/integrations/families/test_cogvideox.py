"""CogVideoX 1.0 and 1.5: text first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

import openvsa
from joint_family import JointFamilyTests, check_hoist, check_mask_is_refused, close, perturbed, run


def build(patch_t: int | None = None, rotary: bool = True) -> nn.Module:
    return perturbed(
        CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=12,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            patch_size_t=patch_t,
            max_text_seq_length=7,
            use_rotary_positional_embeddings=rotary,
            patch_bias=patch_t is None,
        )
    )


def call(
    grid: tuple[int, ...], text: tuple[int, ...] = (7,), patch_t: int | None = None, rotary: bool = True
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    positions = get_3d_rotary_pos_embed(
        16, ((0, 0), (h, w)), (h, w), t, grid_type="slice" if patch_t else "linspace", max_size=(h, w)
    )
    return {
        "hidden_states": torch.randn(len(text), t * (patch_t or 1), 4, 2 * h, 2 * w, generator=generator),
        "encoder_hidden_states": torch.randn(len(text), text[0], 12, generator=generator),
        "timestep": torch.full((len(text),), 500.0),
        "image_rotary_emb": positions if rotary else None,
    }


class TestCogVideoX(JointFamilyTests):
    layers = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    forward = ("hidden_states", "encoder_hidden_states", "timestep")
    config = ("patch_size", "patch_size_t")

    def model(self) -> nn.Module:
        return build()

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        return call(grid, text)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = CogVideoXPipeline(None, None, None, self.model(), CogVideoXDDIMScheduler())
        return pipe, {
            "prompt_embeds": torch.randn(1, 7, 12),
            "negative_prompt_embeds": torch.randn(1, 7, 12),
            "height": 64, "width": 96, "num_frames": 9,
        }  # fmt: skip


class TestCogVideoX15(TestCogVideoX):
    def model(self) -> nn.Module:
        return build(patch_t=2)

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        return call(grid, text, patch_t=2)


def test_sinusoidal_positions() -> None:
    model, inputs = build(rotary=False), call((3, 4, 6), rotary=False)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, inputs), dense)


@pytest.mark.parametrize(("patch_t", "rotary", "entering"), [(None, True, 3), (None, False, 1), (2, True, 3)])
def test_tokens_are_reordered_once(
    patch_t: int | None, rotary: bool, entering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = call((3, 4, 5), (7, 7), patch_t=patch_t, rotary=rotary)
    check_hoist(build(patch_t, rotary), inputs, monkeypatch, entering)


def test_rotary_positions_reach_the_processor() -> None:
    model = build()
    with openvsa.sparsify(model, density=1.0):
        assert not torch.equal(run(model, call((3, 4, 6))), run(model, call((3, 4, 6), rotary=False)))


def test_fused_projections() -> None:
    model, inputs = build(), call((3, 4, 6))
    model.fuse_qkv_projections()  # type: ignore[operator]
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, inputs), dense)
    assert torch.equal(run(model, inputs), dense)


def test_a_mask_of_the_callers_own_is_refused() -> None:
    model, inputs = build(), call((3, 4, 6))
    inputs["attention_kwargs"] = {"attention_mask": -4.0 * (torch.arange(7 + 72) % 5 == 0).expand(2, 1, -1)}
    check_mask_is_refused(model, inputs)


def test_latents_of_another_shape_are_named() -> None:
    model, inputs = build(), call((3, 4, 6))
    inputs["hidden_states"] = inputs["hidden_states"][0]
    openvsa.sparsify(model, density=0.3)
    with pytest.raises(openvsa.ShapeError, match=r"latents of 5 dimensions.*\[3, 4, 8, 12\]"):
        run(model, inputs)
