"""LTX-Video, whose lattice comes as sizes or as coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import LTXI2VLongMultiPromptPipeline
from diffusers.schedulers import LTXEulerAncestralRFScheduler
from PIL import Image
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import family_checks as checks
import openvsa
from openvsa.integrations.families import Sequence
from openvsa.integrations.families.coordinates import sequence_of_coordinates
from tiny_pipelines import WORDS, tokenizer

GRID = (3, 4, 6)


@pytest.fixture
def model() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=16,
    ).eval()


def inputs(tokens: int, samples: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "hidden_states": checks.randoms(samples, tokens, 8),
        "encoder_hidden_states": checks.randoms(samples, 5, 16, salt=1),
        "timestep": torch.full((len(samples),), 700.0),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * len(samples)),
    }


def run(model: LTXVideoTransformer3DModel, grid: tuple[int, ...], samples: tuple[int, ...] = (0, 1)) -> Tensor:
    frames, height, width = grid
    given = inputs(frames * height * width, samples)
    with torch.no_grad():
        return model(**given, num_frames=frames, height=height, width=width, rope_interpolation_scale=(0.3, 32, 32))[0]


def coordinates(*lattices: tuple[int, int, int, int], batch: int = 1) -> Tensor:
    """[B, 3, S] of lattices (first pixel frame, T, H, W) one after the other, made as the condition pipeline does."""
    parts = []
    for first, frames, height, width in lattices:
        ids = LTXConditionPipeline._prepare_video_ids(batch, frames, height, width)
        parts.append(LTXConditionPipeline._scale_video_ids(ids, 32, 8, frame_index=first))
    coords = torch.cat(parts, 2).float()
    coords[:, 0] /= 25
    return coords


def run_conditioned(model: LTXVideoTransformer3DModel, grid: tuple[int, int, int]) -> Tensor:
    """The video after one conditioning frame; as in the pipeline, each token has a timestep of its own."""
    coords = coordinates((9, 1, *grid[1:]), (0, *grid), batch=2)
    given = inputs(coords.shape[2], (0, 1))
    given["timestep"] = torch.full(coords.shape[::2], 700.0)
    given["timestep"][:, : grid[1] * grid[2]] = 0.0
    with torch.no_grad():
        return model(**given, video_coords=coords)[0]


def test_density_one_equals_dense_on_lattices_in_a_row(model: LTXVideoTransformer3DModel) -> None:
    checks.check_density_one(model, run, [GRID, (1, 1, 1), (5, 3, 7), (2, 8, 8)])


def test_detach_is_exact(model: LTXVideoTransformer3DModel) -> None:
    checks.check_detach(model, run, (5, 7, 9))


def test_guidance_batched_and_split(model: LTXVideoTransformer3DModel) -> None:
    checks.check_guidance(model, run, (5, 7, 9))


def test_text_stays_dense(model: LTXVideoTransformer3DModel) -> None:
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    checks.check_only_these_are_sparse(model, run, (5, 7, 9), names)


def test_contract_with_diffusers(model: LTXVideoTransformer3DModel) -> None:
    forward = {"hidden_states", "encoder_hidden_states", "timestep", "num_frames", "height", "width", "video_coords"}
    checks.check_contract(model, run, GRID, "LTXVideoAttnProcessor", forward)


@pytest.mark.parametrize("levels", [(2, 315), (2, 315, 1), (2, 1), (2, 1, 1)], ids=str)
def test_tokens_change_their_order_once(model: LTXVideoTransformer3DModel, levels: tuple[int, ...]) -> None:
    """Noise levels that differ between tokens change with them: image to video has two axes, the pipeline for long
    videos three. One for all tokens, as in the condition pipeline without a condition, stays."""
    noise = 700 * torch.rand(levels, generator=torch.Generator().manual_seed(2))
    given = inputs(315, (0, 1)) | {"timestep": noise}

    def run_one() -> Tensor:
        with torch.no_grad():
            return model(**given, num_frames=5, height=7, width=9)[0]

    checks.check_hoist(model, run_one)


def test_conditioning_frames_stay_dense(model: LTXVideoTransformer3DModel) -> None:
    grid = (5, 6, 8)
    dense = run_conditioned(model, grid)
    with openvsa.sparsify(model, density=1.0):
        checks.close(run_conditioned(model, grid), dense)
    event = checks.events_of(model, lambda: run_conditioned(model, grid), density=0.2)[0]
    assert event.layout.grid == grid
    assert event.timestep == 700.0
    checks.check_conditioning_is_dense(event, prefix=48, suffix=0)
    checks.check_hoist(model, lambda: run_conditioned(model, grid))


@pytest.mark.parametrize(
    ("lattices", "expected"),
    [
        ([(0, 3, 4, 6)], Sequence((3, 4, 6))),
        ([(0, 1, 1, 1)], Sequence((1, 1, 1))),
        ([(0, 4, 1, 1)], Sequence((4, 1, 1))),
        ([(0, 2, 3, 1)], Sequence((2, 3, 1))),
        ([(8, 1, 4, 6), (16, 1, 4, 6), (0, 3, 4, 6)], Sequence((3, 4, 6), prefix=48)),
        ([(8, 2, 4, 6), (0, 2, 4, 6)], Sequence((2, 4, 6), prefix=48)),
        ([(0, 4, 4, 6), (0, 1, 4, 6), (0, 1, 4, 6)], Sequence((4, 4, 6), suffix=48)),
        ([(8, 1, 2, 3), (0, 3, 4, 6)], Sequence((3, 4, 6), prefix=6)),
    ],
)
def test_the_lattice_is_read_from_coordinates(lattices: list[tuple[int, int, int, int]], expected: Sequence) -> None:
    assert sequence_of_coordinates(coordinates(*lattices, batch=2), first=False) == expected


def test_coordinates_without_a_lattice_are_refused(model: LTXVideoTransformer3DModel) -> None:
    coords = coordinates((0, 3, 4, 6), batch=2)
    with pytest.raises(openvsa.UnsupportedError, match="their rows or frames differ in length"):
        sequence_of_coordinates(coords[:, :, :-1], first=False)
    coords[1, 0] += 1
    with pytest.raises(openvsa.UnsupportedError, match="run them one by one"):
        sequence_of_coordinates(coords, first=False)
    with pytest.raises(
        openvsa.UnsupportedError, match=r"expected token coordinates \[batch, 3, tokens\], got \[3, 72\]"
    ):
        sequence_of_coordinates(coords[0], first=False)
    with openvsa.sparsify(model, density=0.5), pytest.raises(openvsa.UnsupportedError, match="'num_frames': None"):
        model(**inputs(72, (0,)))


def test_a_wrong_lattice_is_refused(model: LTXVideoTransformer3DModel) -> None:
    """RoPE tables of one token fit a sequence of any length, so the model itself would not notice."""
    with openvsa.sparsify(model, density=0.5), pytest.raises(openvsa.OpenVSAError, match="72"):
        model(**inputs(72, (0,)), num_frames=1, height=1, width=1)


def test_sizes_of_one_beside_coordinates_are_ignored(model: LTXVideoTransformer3DModel) -> None:
    """The pipeline for long videos passes them so."""

    def run_one() -> None:
        given = inputs(72, (0,)) | {"video_coords": coordinates((0, 3, 4, 6))}
        model(**given, num_frames=1, height=1, width=1)

    events = checks.events_of(model, run_one, density=0.5)
    assert [event.layout.grid for event in events] == [(3, 4, 6)] * 2


@pytest.mark.parametrize("sizes", [{"num_frames": 1, "height": 1, "width": 1}, {}])
def test_of_two_equal_lattices_one_is_the_video(model: LTXVideoTransformer3DModel, sizes: dict[str, int]) -> None:
    """In long videos the first, which a guide of its length follows; else the last, which conditions go before."""

    def run_one() -> None:
        model(**inputs(144, (0,)), video_coords=coordinates((0, 3, 4, 6), (0, 3, 4, 6)), **sizes)

    layouts = [event.layout for event in checks.events_of(model, run_one, density=0.5)]
    expected = (0, 72) if sizes else (72, 0)
    assert [(layout.prefix, layout.suffix) for layout in layouts] == [expected] * 2


def test_long_videos_leave_out_the_last_timestep(model: LTXVideoTransformer3DModel) -> None:
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    parts = {"scheduler": LTXEulerAncestralRFScheduler(), "vae": autoencoder(), "transformer": model}
    pipe = LTXI2VLongMultiPromptPipeline(**parts, text_encoder=T5EncoderModel(config).eval(), tokenizer=tokenizer())
    pipe.set_progress_bar_config(disable=True)
    config = openvsa.SparsityConfig(density=0.3, min_tokens=0, dense_first_steps=1, dense_last_steps=1)
    events: list[Any] = []
    with openvsa.sparsify(pipe, config=config) as handle:
        handle.on_attention(lambda event: events.append(event) if event.layer == 0 else None)
        pipe(
            prompt="a cat", guidance_scale=1.0, height=32, width=32, num_frames=17, temporal_tile_size=20,
            temporal_overlap=8, num_inference_steps=5, seed=0, output_type="latent",
        )  # fmt: skip
    assert [(event.step, event.plan is None) for event in events] == [(0, True), (1, False), (2, False), (3, True)]


def autoencoder() -> AutoencoderKLLTXVideo:
    """Each latent is 4 x 4 x 4 pixels."""
    halves = (True, True, False, False)
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=halves,
        decoder_spatio_temporal_scaling=halves,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    ).eval()


PICTURE = Image.new("RGB", (32, 32), "red")
CONDITIONS = [LTXVideoCondition(image=PICTURE, frame_index=index) for index in (0, 8)]


@pytest.mark.parametrize(
    ("kind", "more", "prefix"),
    [
        (LTXPipeline, {}, 0),
        (LTXImageToVideoPipeline, {"image": PICTURE}, 0),
        (LTXConditionPipeline, {}, 0),
        (LTXConditionPipeline, {"conditions": CONDITIONS}, 128),
    ],
    ids=["text", "image", "no-conditions", "conditions"],
)
def test_whole_pipelines(model: LTXVideoTransformer3DModel, kind: Any, more: dict[str, Any], prefix: int) -> None:
    """Guidance, noise levels per token and conditioning as the pipelines make them, to the latents."""
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": autoencoder(), "transformer": model}
    pipe = kind(**parts, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    embeds, masks = checks.randoms((0, 1), 1, 5, 16), torch.ones(2, 1, 5)

    def run_pipe() -> Tensor:
        return pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            prompt_attention_mask=masks[0],
            negative_prompt_attention_mask=masks[1],
            height=64,
            width=32,
            num_frames=17,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **more,
        ).frames

    dense = run_pipe()
    with openvsa.sparsify(pipe, density=1.0):
        checks.close(run_pipe(), dense)
    events = checks.events_of(pipe, run_pipe, density=0.3)
    assert {(event.layout.grid, event.layout.prefix) for event in events} == {((5, 16, 8), prefix)}
    levels = [event.timestep for event in events]
    assert len(set(levels)) == 3
    assert levels == sorted(levels, reverse=True)
    assert torch.equal(run_pipe(), dense)
