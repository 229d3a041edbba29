"""Flux.1 and Flux.2: text first, then an image of two dimensions, then reference images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

import cost_model
import openvsa
from joint_family import JointFamilyTests, check_hoist, check_mask_is_refused, close, perturbed, run
from openvsa import SparsityConfig
from openvsa.integrations.families.flux import image_grid

TEXT = 7


def build() -> nn.Module:
    return perturbed(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
        )
    )


def ids(height: int, width: int, image: int = 0, columns: int = 3) -> Tensor:
    table = torch.zeros(height, width, columns)
    table[..., 0] = image
    table[..., 1] = torch.arange(height)[:, None]
    table[..., 2] = torch.arange(width)
    return table.flatten(0, 1)


def call(
    grid: tuple[int, ...], text: tuple[int, ...] = (TEXT,), reference: tuple[int, int] | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    table = ids(*grid)
    if reference:
        table = torch.cat([table, ids(*reference, image=1)])
    return {
        "hidden_states": torch.randn(len(text), len(table), 4, generator=generator),
        "encoder_hidden_states": torch.randn(len(text), TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(len(text), 8, generator=generator),
        "timestep": torch.full((len(text),), 0.5),
        "img_ids": table,
        "txt_ids": torch.zeros(TEXT, 3),
    }


class TestFlux(JointFamilyTests):
    grids = ((6, 8), (13, 17), (1, 1), (5, 3), (1, 9), (9, 1))
    layers = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
    steps = (1.0, 0.9, 0.8, 0.7)
    forward = ("encoder_hidden_states", "timestep", "img_ids")

    def model(self) -> nn.Module:
        return build()

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (TEXT,)) -> dict[str, Any]:
        return call(grid, text)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, self.model())  # pyright: ignore[reportArgumentType]
        return pipe, {
            "prompt_embeds": torch.randn(1, TEXT, 12),
            "pooled_prompt_embeds": torch.randn(1, 8),
            "negative_prompt_embeds": torch.randn(1, TEXT, 12),
            "negative_pooled_prompt_embeds": torch.randn(1, 8),
            "true_cfg_scale": 2.0, "height": 128, "width": 192,
        }  # fmt: skip


class TestFlux2(JointFamilyTests):
    grids = ((6, 8), (13, 17), (5, 3))
    layers = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
    steps = (1.0, 0.9, 0.8, 0.7)
    forward = ("encoder_hidden_states", "timestep", "img_ids", "kv_cache_mode")

    def model(self) -> nn.Module:
        return perturbed(
            Flux2Transformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=12,
                timestep_guidance_channels=16,
                mlp_ratio=2.0,
                axes_dims_rope=(4, 4, 4, 4),
            )
        )

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (TEXT,)) -> dict[str, Any]:
        inputs = call(grid, text)
        inputs.pop("pooled_projections")
        image = torch.cat([ids(*grid, columns=4), ids(2, 3, image=10, columns=4)])
        inputs["hidden_states"] = torch.randn(len(text), len(image), 4, generator=torch.Generator().manual_seed(2))
        inputs["img_ids"] = image.expand(len(text), -1, -1)
        inputs["txt_ids"] = torch.zeros(len(text), TEXT, 4)
        inputs["guidance"] = torch.full((len(text),), 3.5)
        return inputs

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, self.model())  # pyright: ignore[reportArgumentType]
        return pipe, {"prompt_embeds": torch.randn(1, TEXT, 12), "height": 128, "width": 192}

    def test_a_key_value_cache_is_refused(self) -> None:
        model = self.model()
        openvsa.sparsify(model, density=0.3)
        with pytest.raises(openvsa.UnsupportedError, match="kv_cache_mode='extract'"):
            run(model, {**self.inputs((6, 8)), "kv_cache_mode": "extract", "num_ref_tokens": 6})


@pytest.mark.parametrize("reference", [None, (3, 4)])
def test_tokens_are_reordered_once(reference: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and their ids, with those of Kontext's reference image beside them."""
    check_hoist(build(), call((6, 9), (TEXT, TEXT), reference), monkeypatch, entering=2, tile=(2, 4))


def test_tokens_of_flux_2_are_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = TestFlux2()
    check_hoist(family.model(), family.inputs((6, 9), (TEXT, TEXT)), monkeypatch, entering=2, tile=(2, 4))


def test_residuals_of_a_controlnet(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(), call((6, 9), (TEXT, TEXT))
    plain = run(model, inputs)
    residuals = torch.randn(3, 2, 54, 32, generator=torch.Generator().manual_seed(5)).unbind()
    inputs |= {"controlnet_block_samples": residuals[:1], "controlnet_single_block_samples": list(residuals[1:])}
    dense = run(model, inputs)
    assert not torch.allclose(dense, plain, atol=1e-2)
    with openvsa.sparsify(model, density=1.0):
        close(run(model, inputs), dense)
    check_hoist(model, inputs, monkeypatch, entering=2 + 3, tile=(2, 4))


def test_a_mask_of_the_callers_own_stays_in_raster_order() -> None:
    model, inputs = build(), call((6, 8))
    keys = torch.arange(TEXT + 48) % 5 > 0
    inputs["joint_attention_kwargs"] = {"attention_mask": keys.expand(1, 1, TEXT + 48, -1)}
    check_mask_is_refused(model, inputs)


def test_a_reference_image_stays_dense() -> None:
    model, inputs, events = build(), call((6, 8), reference=(3, 4)), []
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=1.0) as handle:
        handle.on_attention(events.append)
        close(run(model, inputs), dense)
        handle.density = 0.3
        run(model, inputs)
    assert {(event.layout.grid, event.layout.prefix, event.layout.suffix) for event in events} == {((6, 8), TEXT, 12)}
    text = list(events[-1].layout.text_blocks)
    assert events[-1].plan.block_mask()[..., text].all()


def test_a_reference_image_counts_as_dense_where_it_is_asked_what_pays(tmp_path: Path) -> None:
    """Half of the pairs within the image are left out: without a reference these are enough of all pairs."""
    model, config = build(), SparsityConfig(density=0.5, tile=(2, 2))
    with cost_model.machine(tmp_path, dense_ms_per_pair=1.0, sparse_ms_per_pair=1.5):
        with openvsa.sparsify(model, config=config), warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, call((8, 8)))
        density = 1 - 0.5 * (64 / (64 + 36 + TEXT)) ** 2
        why = f"attention stays dense: 107 tokens at density {density:.3g} would not be faster"
        with openvsa.sparsify(model, config=config), pytest.warns(UserWarning, match=why):
            run(model, call((8, 8), reference=(6, 6)))


def test_an_ip_adapter_is_refused() -> None:
    model = build()
    model.get_submodule("transformer_blocks.0.attn").set_processor(FluxIPAdapterAttnProcessor(32, 12))  # type: ignore[operator]
    with pytest.raises(openvsa.UnsupportedError, match="FluxIPAdapterAttnProcessor"):
        openvsa.sparsify(model, density=0.3)


def test_large_images_in_bfloat16_ids() -> None:
    assert image_grid(ids(300, 270).bfloat16()) == (300, 270)


@pytest.mark.parametrize(
    "table",
    [
        ids(4, 6).view(4, 6, 3).transpose(0, 1).flatten(0, 1),
        torch.cat([ids(4, 6), ids(4, 3)]),
        ids(4, 6).flip(0),
        torch.zeros(5, 2),
    ],
)
def test_ids_that_are_no_image_are_refused(table: Tensor) -> None:
    with pytest.raises(openvsa.UnsupportedError, match=r"raster order|expected img_ids"):
        image_grid(table)


def test_an_image_that_does_not_fit_its_ids_is_refused() -> None:
    model, inputs = build(), call((6, 8))
    inputs["img_ids"] = ids(6, 7)
    openvsa.sparsify(model, density=0.3)
    with pytest.raises((openvsa.ShapeError, RuntimeError)):
        run(model, inputs)
