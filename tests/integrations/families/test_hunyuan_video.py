"""HunyuanVideo: text last, padded, in two-stream and one-stream blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

import openvsa
from joint_family import JointFamilyTests, check_hoist, close, perturbed, run
from openvsa import SparsityConfig, UnsupportedError
from openvsa.integrations.families import family_of

TEXT = 11


def build(image: str | None = None, patch_t: int = 1) -> nn.Module:
    return perturbed(
        HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=2,
            patch_size_t=patch_t,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            image_condition_type=image,
        )
    )


def call(grid: tuple[int, ...], text: tuple[int, ...] = (7,), patch_t: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(len(text), 4, t * patch_t, 2 * h, 2 * w, generator=generator),
        "timestep": torch.full((len(text),), 500.0),
        "encoder_hidden_states": torch.randn(len(text), TEXT, 16, generator=generator),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor(text)[:, None]).long(),
        "pooled_projections": torch.randn(len(text), 8, generator=generator),
        "guidance": torch.full((len(text),), 6000.0),
    }


class TestHunyuanVideo(JointFamilyTests):
    layers = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
    dense_attentions = 1
    forward = ("hidden_states", "timestep", "encoder_attention_mask")
    config = ("patch_size", "patch_size_t")
    texts = (4, TEXT)

    def model(self) -> nn.Module:
        return build()

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        return call(grid, text)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
        pipe = HunyuanVideoPipeline(None, None, self.model(), None, scheduler, None, None)
        return pipe, {
            "prompt_embeds": torch.randn(1, TEXT, 16),
            "prompt_attention_mask": (torch.arange(TEXT)[None] < 5).long(),
            "pooled_prompt_embeds": torch.randn(1, 8),
            "height": 64, "width": 96, "num_frames": 9,
        }  # fmt: skip


@pytest.mark.parametrize(("image", "patch_t"), [("token_replace", 1), ("latent_concat", 1), (None, 2)])
def test_image_to_video_and_patches_of_frames(image: str | None, patch_t: int) -> None:
    model, inputs = build(image, patch_t), call((3, 4, 5), (4, TEXT), patch_t)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0) as handle:
        close(run(model, inputs), dense)
        assert {layer.grid for layer in handle.report().layers} == {(3, 4, 5)}


def test_replaced_first_frames_stay_in_place() -> None:
    assert family_of(build("token_replace")).hoist(build("token_replace")) is None


def test_one_prompt_for_a_batch() -> None:
    """As the pipeline calls it for several videos of a prompt that is given as its embedding."""
    model, inputs = build(), call((3, 4, 6), (4, 4))
    inputs |= {name: inputs[name][:1] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    dense = run(model, inputs)
    assert len(dense) == 2
    with openvsa.sparsify(model, density=1.0) as handle:
        close(run(model, inputs), dense)
        assert handle.report().layers[0].sparse_calls == 1


def test_padding_is_never_read() -> None:
    model, inputs = build(), call((3, 4, 6), (4, TEXT))
    with openvsa.sparsify(model, density=0.3):
        before = run(model, inputs)
        inputs["encoder_hidden_states"][0, 4:] = 1e4
        assert torch.equal(run(model, inputs), before)


def test_tokens_are_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hoist(build(), call((3, 4, 6), (4, TEXT)), monkeypatch)


def without_the_first_key(mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)


def causal_but_for_the_first_row(mask: Tensor) -> Tensor:
    tokens = mask.shape[-1]
    pairs = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    pairs[0] = True
    return mask & pairs


@pytest.mark.parametrize("change", [without_the_first_key, causal_but_for_the_first_row])
@pytest.mark.parametrize("compiled", ["nothing", "blocks", "whole"])
def test_another_mask_in_the_last_layer_alone_is_refused(change: Any, compiled: str) -> None:
    """Compiled layers do not see the values of masks: the forward ends with the error."""
    model, inputs = build(), call((3, 4, 6), (4, TEXT))
    last: Any = model.single_transformer_blocks[-1]  # pyright: ignore[reportIndexIssue]

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": change(kwargs["attention_mask"])}

    openvsa.sparsify(model, density=0.3)
    torch.compiler.reset()
    run(model, inputs)
    hook = last.attn.register_forward_pre_hook(replace, with_kwargs=True)
    if compiled == "blocks":
        last.compile(backend="aot_eager")
    whole: Any = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
    with pytest.raises(UnsupportedError, match=r"mask .* not that of padded text with \(4, 11\) valid tokens"):
        run(whole, inputs)
    hook.remove()
    torch.compiler.reset()
    run(whole, inputs)


def test_a_mask_that_layers_share_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at it waits for the device."""
    looks: list[bool] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: looks.append(True) or equal(*pair))
    model, inputs = build(), call((3, 4, 6), (4, TEXT))
    openvsa.sparsify(model, density=0.3)
    run(model, inputs)
    assert len(looks) == 1


def test_a_block_of_one_graph_that_is_refused_says_where_to_read_why() -> None:
    model, inputs = build(), call((3, 4, 6), (4, TEXT))
    last: Any = model.single_transformer_blocks[-1]  # pyright: ignore[reportIndexIssue]
    last.attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].float()}), with_kwargs=True
    )
    openvsa.sparsify(model, density=0.3)
    last.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True, and the error says why"):
        run(model, inputs)


def test_samples_of_several_text_lengths_are_one_call_of_the_report() -> None:
    model, few, many = build(), call((3, 4, 6), (4, 4)), call((3, 4, 6), (TEXT, TEXT))
    mixed, layers = call((3, 4, 6), (4, TEXT, TEXT, TEXT)), []
    for inputs in (few, many, mixed):
        with openvsa.sparsify(model, config=SparsityConfig(density=0.2, tile=(1, 2, 2), dense_first_steps=1)) as handle:
            for level in (900.0, 500.0):
                run(model, {**inputs, "timestep": torch.full_like(inputs["timestep"], level)})
            layers.append(handle.report().layers[0])
    assert {(layer.calls, layer.sparse_calls, layer.requested_density) for layer in layers} == {(2, 1, 0.2)}
    short, long, both = ((layer.delivered_density, layer.executed_density) for layer in layers)
    assert abs(short[0] - long[0]) > 0.01
    assert both == pytest.approx([0.25 * one + 0.75 * other for one, other in zip(short, long, strict=True)])
