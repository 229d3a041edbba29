"""Whole Diffusers pipelines with random weights, where a family's own tests call the transformer alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from torch import Tensor

import openvsa
from joint_family import perturbed
from openvsa import SparsityConfig
from openvsa.integrations.report import AttentionEvent

STEPS = 4
SIZES = {"height": 80, "width": 112, "num_frames": 9}
PICTURE = Image.effect_noise((112, 80), 60).convert("RGB")
Made = tuple[Any, dict[str, Any], tuple[int, int, int], int]
"""A pipeline, its arguments, the lattice it should have, and the forwards that attend in one step."""


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=7.0)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(*shape: int) -> dict[str, Tensor]:
    return {"prompt_embeds": noise(*shape), "negative_prompt_embeds": noise(*shape, seed=2)}


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_transformer(kind: Any = WanTransformer3DModel, in_channels: int = 16, **more: Any) -> Any:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 16, "text_dim": 16, "freq_dim": 16,
        "ffn_dim": 32, "num_layers": 2,
    }  # fmt: skip
    return perturbed(kind(in_channels=in_channels, **sizes, **more))


def wan_of_two_transformers() -> Made:
    parts = wan_transformer(), wan_transformer()
    pipe = WanPipeline(None, None, wan_vae(), euler(), *parts, boundary_ratio=0.95)
    return pipe, {**prompts(1, 7, 16), **SIZES}, (3, 5, 7), 2


def wan_with_a_noise_level_for_each_token() -> Made:
    """Wan 2.2 5B, from a picture."""
    pipe = WanImageToVideoPipeline(
        None, None, wan_vae(), euler(), None, None, wan_transformer(), expand_timesteps=True
    )  # fmt: skip
    return pipe, {**prompts(1, 7, 16), **SIZES, "image": PICTURE}, (3, 5, 7), 2


def wan_vace() -> Made:
    """A reference image is one more frame of the lattice."""
    transformer = wan_transformer(WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96)
    pipe = WanVACEPipeline(None, None, wan_vae(), euler(), transformer)
    return pipe, {**prompts(1, 7, 16), **SIZES, "reference_images": [PICTURE]}, (4, 5, 7), 2


def wan_video_to_video() -> Made:
    """Begins midway: of five steps it takes four."""
    pipe = WanVideoToVideoPipeline(None, None, wan_transformer(), wan_vae(), euler())
    video = {"video": [PICTURE] * 9, "height": 80, "width": 112, "strength": 0.8, "num_inference_steps": 5}
    return pipe, {**prompts(1, 7, 16), **video}, (3, 5, 7), 2


def cosmos_from_a_picture() -> Made:
    class Safe:
        """In place of the checker, which is a package of its own with weights."""

        def to(self, device: Any) -> None: ...

    sizes: dict[str, Any] = {
        "in_channels": 17, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2,
        "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (8, 32, 32),
        "concat_padding_mask": False,
    }  # fmt: skip
    transformer = perturbed(CosmosTransformer3DModel(**sizes))
    checker: Any = Safe()
    pipe = Cosmos2VideoToWorldPipeline(
        None, None, transformer, wan_vae(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), checker
    )  # fmt: skip
    return pipe, {**prompts(1, 7, 16), **SIZES, "image": PICTURE}, (3, 5, 7), 2


def kandinsky(kind: Any, frames: int, **more: Any) -> Made:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=48, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 8, 8), visual_cond=True,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    pipe = kind(perturbed(transformer), vae, None, None, None, None, euler())
    given: dict[str, Any] = {}
    for branch, tokens in (("", 5), ("negative_", 3)):
        given[f"{branch}prompt_embeds_qwen"] = noise(1, tokens, 16, seed=tokens)
        given[f"{branch}prompt_embeds_clip"] = noise(1, 8, seed=tokens)
        given[f"{branch}prompt_cu_seqlens"] = torch.tensor([0, tokens], dtype=torch.int32)
    return pipe, {**given, **SIZES, "num_frames": 4 * frames - 3, **more}, (frames, 5, 7), 2


def kandinsky_from_text() -> Made:
    return kandinsky(Kandinsky5T2VPipeline, 3)


def kandinsky_from_a_picture() -> Made:
    """Its first frame gets the statistics of those after it, so there have to be some."""
    return kandinsky(Kandinsky5I2VPipeline, 7, image=PICTURE)


def ltx2_with_all_its_guidance() -> Made:
    """Both prompts in one batch, the prompt again with a block that does not attend, and again without the sound."""
    channels: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24,
        "cross_attention_dim": 48, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 12, "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16,
    }  # fmt: skip
    transformer = perturbed(LTX2VideoTransformer3DModel(**channels, perturbed_attn=True))
    connectors = LTX2TextConnectors(
        16, 3, video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), down_block_types=("LTX2VideoDownBlock3D",),
        upsample_residual=(False,), upsample_factor=(1,), upsample_type=("spatial",), patch_size=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2,
    )  # fmt: skip
    audio = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = LTX2Pipeline(scheduler, vae, audio, None, None, connectors.eval(), transformer, None)
    given: dict[str, Any] = {**prompts(1, 5, 16, 3), "height": 32, "width": 32, "num_frames": 5}
    given |= {"prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5)}
    return (
        pipe,
        {**given, "stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1], "modality_scale": 3.0},
        (3, 8, 8),
        3,
    )


MAKERS: tuple[Callable[[], Made], ...] = (
    wan_of_two_transformers,
    wan_with_a_noise_level_for_each_token,
    wan_vace,
    wan_video_to_video,
    cosmos_from_a_picture,
    kandinsky_from_text,
    kandinsky_from_a_picture,
    ltx2_with_all_its_guidance,
)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_a_whole_pipeline(maker: Callable[[], Made]) -> None:
    """Lattice, steps and branches of guidance are those that the pipeline runs, and it is left as it was."""
    torch.manual_seed(0)
    pipe, given, grid, forwards = maker()
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        options = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, **given}
        return torch.as_tensor(pipe(**options, generator=torch.Generator().manual_seed(4))[0])

    dense = generate()
    assert dense.isfinite().all()
    with openvsa.sparsify(pipe, density=1.0) as handle:
        # The RoPE of Kandinsky rounds queries and keys to bfloat16, so the last bit of an input may become much more.
        atol = 3e-2 if "Kandinsky" in type(pipe).__name__ else 2e-3
        torch.testing.assert_close(generate(), dense, rtol=1e-3, atol=atol)
        assert all(layer.sparse_calls == layer.calls for layer in handle.report().layers)
    events: list[AttentionEvent] = []
    config = SparsityConfig(density=0.3, dense_first_steps=1, dense_last_steps=1, reuse_steps=2)
    with openvsa.sparsify(pipe, config=config) as handle:
        handle.on_attention(events.append)
        sparse = generate()
        first = [event for event in events if event.layer == events[0].layer]
        assert torch.equal(generate(), sparse)
    assert not torch.equal(sparse, dense)
    assert torch.equal(generate(), dense)

    assert {event.layout.grid for event in events} == {grid}
    levels = list(dict.fromkeys(event.timestep for event in events))
    assert len(levels) == STEPS
    assert levels == sorted(levels, reverse=True)
    assert {event.timestep for event in events if event.plan is None} == {levels[0], levels[-1]}
    if not hasattr(pipe, "transformer_2") or pipe.transformer_2 is None:
        assert len(first) == STEPS * forwards
        plans = [id(event.plan) for event in first if event.plan is not None]
        assert len(plans) == 2 * forwards
        assert plans[:forwards] == plans[forwards:], "each branch uses its own plan again"
        assert len(set(plans)) == forwards


def test_a_pipeline_made_from_another_counts_steps_of_its_own() -> None:
    """They share a scheduler, but only one of them was given to sparsify. Video to video takes three steps of five."""
    torch.manual_seed(0)
    pipe = WanPipeline(None, None, wan_vae(), euler(), wan_transformer())
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    given = {**prompts(1, 7, 16), "num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
    events: list[AttentionEvent] = []
    config = SparsityConfig(density=0.3, dense_first_steps=1, dense_last_steps=1)
    with openvsa.sparsify(pipe, config=config) as handle:
        handle.on_attention(events.append)
        pipe(**given, **SIZES)
        other(**given, video=[PICTURE] * 9, height=80, width=112, strength=0.6)
    sparse = [event.plan is not None for event in events if event.layer == 0]
    assert sparse[:5] == [False, True, True, True, False]
    assert sparse[5:] == [False, True, False]


def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return {}


def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 1:
        raise KeyboardInterrupt
    return {}


@pytest.mark.parametrize("end", [interrupt, fail])
@pytest.mark.parametrize("attached", ["pipeline", "transformer"])
def test_steps_are_counted_anew_after_an_interrupted_generation(end: Any, attached: str) -> None:
    """By another pipeline with a scheduler of its own, whose first noise level is that of the last step, or less."""
    torch.manual_seed(0)
    pipe = WanPipeline(None, None, wan_vae(), euler(), wan_transformer())
    other = WanVideoToVideoPipeline(None, None, pipe.transformer, pipe.vae, euler())
    given = {**prompts(1, 7, 16), "guidance_scale": 1.0, "output_type": "latent"}
    events: list[AttentionEvent] = []
    # Without the pipeline nothing but the one that runs can tell.
    whole, last = (pipe, 1) if attached == "pipeline" else (pipe.transformer, 0)
    config = SparsityConfig(density=0.3, dense_first_steps=1, dense_last_steps=last)

    def sparse_steps(which: Any, **arguments: Any) -> list[bool]:
        events.clear()
        with contextlib.suppress(KeyboardInterrupt):
            which(**given, **arguments)
        return [event.plan is not None for event in events if event.layer == 0]

    with openvsa.sparsify(whole, config=config) as handle:
        handle.on_attention(events.append)
        video = {"video": [PICTURE] * 9, "height": 80, "width": 112}
        assert sparse_steps(pipe, **SIZES, num_inference_steps=5, callback_on_step_end=end) == [False, True]
        for strength in (0.8, 0.6):
            halfway = {**video, "num_inference_steps": 5, "callback_on_step_end": end, "strength": strength}
            assert sparse_steps(other, **halfway) == [False, True]
        assert sparse_steps(other, **video, num_inference_steps=10, strength=0.4) == [False, True, True, not last]
