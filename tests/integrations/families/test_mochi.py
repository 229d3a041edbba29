"""Mochi: the valid text of each sample last, one attention call for each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

import openvsa
from joint_family import JointFamilyTests, check_hoist, close, perturbed, run

TEXT = 9


def build(layers: int = 2) -> Any:
    return perturbed(
        MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=layers,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=TEXT,
        )
    )


def call(grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(len(text), 4, t, 2 * h, 2 * w, generator=generator),
        "encoder_hidden_states": torch.randn(len(text), TEXT, 16, generator=generator),
        "timestep": torch.full((len(text),), 500.0),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(text)[:, None],
    }


class TestMochi(JointFamilyTests):
    layers = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    forward = ("hidden_states", "timestep", "encoder_attention_mask")
    fullgraph = False  # its processor looks for valid tokens on the host
    config = ("patch_size",)
    steps = (0.0, 0.78, 1.56, 2.34)  # rising, unlike everyone else's
    texts = (0, TEXT)  # an empty negative prompt has no valid token

    def model(self) -> nn.Module:
        return build()

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        return call(grid, text)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), None, None, None, self.model())
        return pipe, {
            "prompt_embeds": torch.randn(1, TEXT, 16),
            "prompt_attention_mask": torch.arange(TEXT)[None] < 5,
            "negative_prompt_embeds": torch.randn(1, TEXT, 16),
            "negative_prompt_attention_mask": torch.zeros(1, TEXT, dtype=torch.bool),
            "height": 96, "width": 128, "num_frames": 13,
        }  # fmt: skip


def test_valid_tokens_need_not_come_first() -> None:
    model, inputs = build(), call((3, 4, 6), (5, 5))
    inputs["encoder_attention_mask"][0] = inputs["encoder_attention_mask"][0].flip(0)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, inputs), dense)


def test_tokens_are_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hoist(build(), call((3, 4, 5), (0, TEXT, 4)), monkeypatch)


def with_faster_cache(attention_range: int = 2) -> MochiTransformer3DModel:
    torch.manual_seed(0)
    model = build()
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=attention_range,
            spatial_attention_block_identifiers=("transformer_blocks",),
            unconditional_batch_skip_range=3,
            unconditional_batch_timestep_skip_range=(-1, 1001),
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCFHW",
            current_timestep_callback=lambda: 500,
        )
    )
    return model


RISING = (100.0, 200.0, 300.0)  # Mochi's levels


def test_half_of_a_batch_under_faster_cache() -> None:
    """It leaves the negative prompt's samples out of some forwards, within the model's own forward."""
    inputs = call((3, 4, 6), (0, 7))

    def outputs(sparse: bool) -> list[Tensor]:
        model = with_faster_cache()
        if sparse:
            openvsa.sparsify(model, density=1.0)
        return [run(model, {**inputs, "timestep": torch.full((2,), level)}) for level in RISING]

    for ours, dense in zip(outputs(True), outputs(False), strict=True):
        close(ours, dense)


@pytest.mark.parametrize("lengths", [(7, 7), (3, 7)])
def test_half_of_a_batch_has_plans_of_its_own(lengths: tuple[int, int]) -> None:
    inputs, model = call((3, 4, 6), lengths), with_faster_cache(1)
    events: list[Any] = []
    with openvsa.sparsify(model, config=openvsa.SparsityConfig(density=0.3, min_tokens=0, reuse_steps=3)) as handle:
        handle.on_attention(lambda event: events.append(event) if event.layer == 0 else None)
        for level in RISING:
            run(model, {**inputs, "timestep": torch.full((2,), level)})
    # Both samples in the first step, then the second one alone.
    assert [event.layout.num_tokens - 72 for event in events] == [*lengths, lengths[1], lengths[1]]
    plans = [event.plan for event in events]
    assert plans[2] is plans[3]
    assert plans[2] is not plans[0]


def test_samples_of_one_length() -> None:
    model, inputs = build(), call((3, 4, 6), (TEXT, TEXT))
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0) as handle:
        close(run(model, inputs), dense)
        assert torch.equal(torch.tensor([layer.delivered_density for layer in handle.report().layers]), torch.ones(2))


def test_compiled_blocks_share_their_graphs() -> None:
    """Not one set for each layer: torch gives up after eight."""
    made = []
    for layers in (2, 4):
        model, inputs = build(layers), call((3, 4, 5))
        torch.compiler.reset()
        counters.clear()
        with openvsa.sparsify(model, density=0.3, min_tokens=0):
            expected = run(model, inputs)
            for block in model.transformer_blocks[:-1]:  # the last one is another, without text
                block.compile(backend="eager", dynamic=False)
            close(run(model, inputs), expected)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] > 0
