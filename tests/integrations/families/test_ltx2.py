"""LTX-2: the video's self-attention among six attentions a block; guidance, keyframes, both forms of RoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor
from torch._subclasses import FakeTensorMode

import family_checks as checks
import openvsa

GRID = (3, 4, 6)


def build(**config: Any) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 12,
        "audio_cross_attention_dim": 24,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return LTX2VideoTransformer3DModel(**sizes | config).eval()


@pytest.fixture
def model() -> LTX2VideoTransformer3DModel:
    return build()


def inputs(tokens: int, samples: tuple[int, ...]) -> dict[str, Any]:
    text = checks.randoms(samples, 5, 16, salt=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * len(samples))
    return {
        "hidden_states": checks.randoms(samples, tokens, 8),
        "audio_hidden_states": checks.randoms(samples, 7, 4, salt=2),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "timestep": torch.full((len(samples),), 700.0),
        "sigma": torch.full((len(samples),), 700.0),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "audio_num_frames": 7,
    }


def run(
    model: LTX2VideoTransformer3DModel, grid: tuple[int, ...], samples: tuple[int, ...] = (0, 1), **more: Any
) -> Tensor:
    frames, height, width = grid
    with torch.no_grad():
        given = inputs(frames * height * width, samples) | {"num_frames": frames, "height": height, "width": width}
        video, audio = model(**given | more, return_dict=False)
    assert audio.isfinite().all()
    return video


def run_with_keyframe(model: LTX2VideoTransformer3DModel, grid: tuple[int, int, int]) -> Tensor:
    """As the condition pipeline: tokens and coordinates of a keyframe after the video's, clean ones at timestep 0."""
    frames, height, width = grid
    video, extra = frames * height * width, height * width
    coords = model.rope.prepare_video_coords(2, frames, height, width, torch.device("cpu"))
    more = inputs(video + extra, (0, 1)) | {"video_coords": torch.cat([coords, coords[:, :, -extra:] + 0.1], 2)}
    more["timestep"] = torch.full((2, video + extra), 700.0)
    more["timestep"][:, video:] = 0.0
    return run(model, grid, audio_timestep=torch.full((2,), 700.0), **more)


def test_density_one_equals_dense_on_lattices_in_a_row(model: LTX2VideoTransformer3DModel) -> None:
    checks.check_density_one(model, run, [GRID, (1, 1, 1), (5, 3, 7), (2, 8, 8)])


def test_split_rope_and_gates_of_ltx_2_3() -> None:
    model = build(rope_type="split", gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, perturbed_attn=True)
    checks.check_density_one(model, run, [GRID, (5, 3, 7)])
    checks.check_contract(model, run, GRID, "LTX2PerturbedAttnProcessor", {"spatio_temporal_guidance_blocks"})


def test_detach_is_exact(model: LTX2VideoTransformer3DModel) -> None:
    checks.check_detach(model, run, (5, 7, 9))


def test_guidance_batched_and_split(model: LTX2VideoTransformer3DModel) -> None:
    checks.check_guidance(model, run, (5, 7, 9))


def test_audio_and_text_stay_dense(model: LTX2VideoTransformer3DModel) -> None:
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    checks.check_only_these_are_sparse(model, run, (5, 7, 9), names)


def test_contract_with_diffusers(model: LTX2VideoTransformer3DModel) -> None:
    forward = {"hidden_states", "encoder_hidden_states", "timestep", "num_frames", "height", "width"}
    checks.check_contract(model, run, GRID, "LTX2AudioVideoAttnProcessor", forward)


@pytest.mark.parametrize("rope", ["interleaved", "split"])
def test_tokens_change_their_order_once(rope: str) -> None:
    """Noise levels that differ between tokens, as in image to video, change with them; audio keeps its order."""
    model = build(rope_type=rope)
    more = {"timestep": 700 * torch.rand(2, 315, generator=torch.Generator().manual_seed(2))}
    more["audio_timestep"] = torch.full((2,), 700.0)
    checks.check_hoist(model, lambda: run(model, (5, 7, 9), **more))


def test_keyframes_stay_dense(model: LTX2VideoTransformer3DModel) -> None:
    grid = (5, 6, 8)
    dense = run_with_keyframe(model, grid)
    with openvsa.sparsify(model, density=1.0):
        checks.close(run_with_keyframe(model, grid), dense)
    event = checks.events_of(model, lambda: run_with_keyframe(model, grid), density=0.2)[0]
    assert event.layout.grid == grid
    assert event.timestep == 700.0
    checks.check_conditioning_is_dense(event, prefix=0, suffix=48)
    checks.check_hoist(model, lambda: run_with_keyframe(model, grid))


def run_with_memory(model: LTX2VideoTransformer3DModel, grid: tuple[int, int, int], rate: float = 24.0) -> Tensor:
    """As Echo: tokens and coordinates of two remembered frames, far later, before the video's; levels [B, S, 1]."""
    frames, height, width = grid
    video, extra, cpu = frames * height * width, 2 * height * width, torch.device("cpu")
    slot = model.rope.prepare_video_coords(2, 1, height, width, cpu)
    slots = [slot + torch.tensor([500.0 + 50 * index, 0, 0]).view(1, 3, 1, 1) for index in range(2)]
    coords = torch.cat([*slots, model.rope.prepare_video_coords(2, frames, height, width, cpu, fps=rate)], 2)
    more = inputs(extra + video, (0, 1)) | {"video_coords": coords, "audio_timestep": torch.full((2,), 700.0)}
    more["timestep"] = 700 * torch.rand(2, extra + video, 1, generator=torch.Generator().manual_seed(2))
    more["timestep"][:, :extra] = 0.0
    return run(model, grid, **more)


@pytest.mark.parametrize(("grid", "rate"), [((5, 6, 8), 24.0), ((2, 8, 8), 8.0), ((1, 8, 8), 24.0)])
def test_tokens_of_a_memory_before_the_video_stay_dense(
    model: LTX2VideoTransformer3DModel, grid: tuple[int, int, int], rate: float
) -> None:
    dense = run_with_memory(model, grid, rate)
    with openvsa.sparsify(model, density=1.0):
        checks.close(run_with_memory(model, grid, rate), dense)
    event = checks.events_of(model, lambda: run_with_memory(model, grid, rate), density=0.2)[0]
    assert (event.layout.grid, event.layout.prefix, event.layout.suffix) == (grid, 2 * grid[1] * grid[2], 0)
    checks.check_hoist(model, lambda: run_with_memory(model, grid, rate))


def test_a_video_at_neither_end_is_refused(model: LTX2VideoTransformer3DModel) -> None:
    with openvsa.sparsify(model, density=0.5), pytest.raises(openvsa.UnsupportedError, match="48 tokens beside the 72"):
        run(model, GRID, **inputs(120, (0, 1)), video_coords=torch.rand(2, 3, 120, 2))


def test_coordinates_without_values_are_not_read(model: LTX2VideoTransformer3DModel) -> None:
    given = inputs(72 + 48, (0, 1)) | {"video_coords": torch.rand(2, 3, 120, 2), "audio_timestep": torch.ones(2)}
    given |= {"timestep": torch.ones(2, 120), "num_frames": 3, "height": 4, "width": 6}
    with torch.no_grad(), openvsa.sparsify(model, density=0.5):
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            faked = {name: fakes.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.items()}
            assert model(**faked, return_dict=False)[0].shape == (2, 120, 8)
        empty = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
        assert model.to("meta")(**empty, return_dict=False)[0].shape == (2, 120, 8)


@pytest.mark.parametrize("mask", [None, torch.tensor([0.0, 1.0])], ids=["all", "one-sample"])
def test_spatio_temporal_guidance(mask: Tensor | None) -> None:
    """It replaces the attention of a block by its values, for all samples (then nothing is attended) or for some."""
    model = build(perturbed_attn=True)
    more = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": mask}
    dense = run(model, GRID, **more)
    with openvsa.sparsify(model, density=1.0) as handle:
        checks.close(run(model, GRID, **more), dense)
        ran = [layer.name for layer in handle.report().layers]
    assert ran == [f"transformer_blocks.{index}.attn1" for index in range(1 if mask is None else 2)]


def test_branches_of_guidance_with_one_prompt_keep_plans_of_their_own() -> None:
    """The pipeline runs the prompt again with blocks that do not attend, and without the sound."""
    model, prompt, video = build(perturbed_attn=True), checks.randoms((0,), 5, 16, salt=1), GRID
    given = [{}, {"spatio_temporal_guidance_blocks": [1]}, {"isolate_modalities": True}]
    plans: list[Any] = []
    config = openvsa.SparsityConfig(density=0.3, tile=(1, 2, 2), reuse_steps=2)
    with openvsa.sparsify(model, config=config) as handle:
        handle.on_attention(lambda event: plans.append(event.plan) if event.layer == 0 else None)
        for level in (700.0, 500.0):
            for more in given:
                run(model, video, (0,), encoder_hidden_states=prompt, timestep=torch.tensor([level]), **more)
    assert len({id(plan) for plan in plans[:3]}) == 3
    assert all(now is before for now, before in zip(plans[3:], plans[:3], strict=True))


def test_a_mask_on_the_video_is_refused(model: LTX2VideoTransformer3DModel) -> None:
    mask = torch.ones(2, 72, 72)
    with openvsa.sparsify(model, density=0.5), pytest.raises(openvsa.UnsupportedError, match="attention mask"):
        run(model, GRID, video_self_attention_mask=mask)


def test_a_missing_or_wrong_lattice_is_refused(model: LTX2VideoTransformer3DModel) -> None:
    coords = model.rope.prepare_video_coords(2, *GRID, torch.device("cpu"))
    with openvsa.sparsify(model, density=0.5):
        with pytest.raises(openvsa.UnsupportedError, match="'num_frames': None"):
            run(model, GRID, video_coords=coords, num_frames=None)
        with pytest.raises(openvsa.UnsupportedError, match=r"72 video tokens, but the lattice \(9, 4, 6\) has 216"):
            run(model, GRID, video_coords=coords, num_frames=9)
