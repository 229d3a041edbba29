"""HunyuanVideo-1.5: text of three kinds last, reordered so that the valid tokens of a sample come first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

import openvsa
from joint_family import JointFamilyTests, check_hoist, close, perturbed, run

TEXT, GLYPHS, IMAGE = 9, 5, 3


def build(channels: int = 4) -> nn.Module:
    return perturbed(
        HunyuanVideo15Transformer3DModel(
            in_channels=channels,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        )
    )


def call(grid: tuple[int, ...], text: tuple[int, ...] = (7,), glyphs: int = 2, image: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch = len(text)
    return {
        "hidden_states": torch.randn(batch, 4, *grid, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16, generator=generator),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(text)[:, None]).long(),
        "encoder_hidden_states_2": torch.randn(batch, GLYPHS, 8, generator=generator),
        "encoder_attention_mask_2": (torch.arange(GLYPHS) < glyphs).long().repeat(batch, 1),
        "image_embeds": torch.randn(batch, IMAGE, 8, generator=generator) * image,
    }


class TestHunyuanVideo15(JointFamilyTests):
    layers = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    dense_attentions = 1
    forward = ("hidden_states", "timestep", "encoder_attention_mask", "encoder_attention_mask_2", "image_embeds")
    config = ("patch_size", "patch_size_t")
    texts = (4, TEXT)

    def model(self) -> nn.Module:
        return build()

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        return call(grid, text)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)  # pyright: ignore[reportArgumentType]
        scheduler, guider = FlowMatchEulerDiscreteScheduler(shift=7.0), ClassifierFreeGuidance(guidance_scale=4.0)
        model = build(channels=4 + 4 + 1)  # latents, those of an image, and where there is one
        pipe: Any = HunyuanVideo15Pipeline(None, None, model, vae, scheduler, None, None, guider)
        pipe.vision_num_semantic_tokens, pipe.vision_states_dim = IMAGE, 8
        branches = {}
        for branch, length in (("", 5), ("negative_", 2)):
            branches[f"{branch}prompt_embeds"] = torch.randn(1, TEXT, 16)
            branches[f"{branch}prompt_embeds_mask"] = (torch.arange(TEXT)[None] < length).long()
            branches[f"{branch}prompt_embeds_2"] = torch.randn(1, GLYPHS, 8)
            branches[f"{branch}prompt_embeds_mask_2"] = torch.zeros(1, GLYPHS).long()
        return pipe, {**branches, "height": 64, "width": 96, "num_frames": 9}


def test_image_to_video() -> None:
    model, inputs = build(), call((3, 4, 5), (4, TEXT), image=True)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0) as handle:
        close(run(model, inputs), dense)
        everything = call((3, 4, 5), (TEXT, TEXT), GLYPHS, image=True)
        run(model, everything)
        handle.detach()
        dense = run(model, everything)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, everything), dense)


def test_a_prompt_without_glyphs() -> None:
    model, inputs = build(), call((3, 4, 5), (6,), glyphs=0)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, inputs), dense)


def test_padding_is_never_read() -> None:
    model, inputs = build(), call((3, 4, 6), (4, TEXT))
    with openvsa.sparsify(model, density=0.3):
        before = run(model, inputs)
        inputs["encoder_hidden_states"][0, 4:] = 1e4
        inputs["encoder_hidden_states_2"][:, 2:] = 1e4
        assert torch.equal(run(model, inputs), before)


def test_tokens_are_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hoist(build(), call((3, 4, 6), (4, TEXT), image=True), monkeypatch)
