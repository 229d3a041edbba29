"""HunyuanVideo-1.5: text of three kinds last, reordered so that the valid tokens of a sample come first."""

from __future__ import annotations

import math
from dataclasses import replace
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
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import openvsa
from joint_family import JointFamilyTests, check_hoist, close, perturbed, run
from openvsa import SparsityConfig, UnsupportedError
from openvsa.integrations.families.hunyuan_video15 import HunyuanVideo15

TEXT, GLYPHS, IMAGE = 9, 5, 3
GRID = (3, 4, 6)


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


class PairsMade(TorchDispatchMode):
    """Counts what is made of all pairs of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.count = tokens, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.count += out.shape[-2:] == (self.tokens, self.tokens) and out.dtype == torch.bool
        return out


def pairs_made(model: nn.Module, inputs: dict[str, Any]) -> int:
    with PairsMade(math.prod(GRID) + TEXT + GLYPHS + IMAGE) as pairs:
        run(model, inputs)
    return pairs.count


def test_sparse_layers_make_no_mask_of_all_pairs_of_tokens() -> None:
    model, inputs = build(), call(GRID, (4, TEXT))
    dense = run(model, inputs)
    both = pairs_made(model, inputs)
    assert both > 0
    with openvsa.sparsify(model, density=0.3, tile=(1, 2, 2), min_tokens=0) as handle:
        assert pairs_made(model, inputs) == 0
        handle.config = replace(handle.config, dense_layers=(1,))
        assert pairs_made(model, inputs) == both / 2
        handle.config = replace(handle.config, density=1.0, dense_layers=())
        close(run(model, inputs), dense)
    assert pairs_made(model, inputs) == both


def mask_the_first_token(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs["attention_mask"].clone()
    mask[:, 0] = False
    return args, {**kwargs, "attention_mask": mask}


def test_another_mask_than_that_of_padding_is_refused_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(), call(GRID, (4, TEXT))
    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(mask_the_first_token, with_kwargs=True)
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=0.3, tile=(1, 2, 2), min_tokens=0):
        with pytest.raises(UnsupportedError, match=r"not that of padded text with \(6, 11\) valid tokens"):
            run(model, inputs)
    monkeypatch.setattr(HunyuanVideo15, "hoist", lambda self, transformer: None)
    lenient = SparsityConfig(density=0.3, tile=(1, 2, 2), min_tokens=0, strict=False)
    with openvsa.sparsify(model, config=lenient) as handle:
        with pytest.warns(UserWarning, match="not that of padded text"):
            close(run(model, inputs), dense)
        assert [layer.sparse_calls for layer in handle.report().layers] == [0, 0]


def test_another_mask_is_refused_in_compiled_blocks_too() -> None:
    model, inputs = build(), call(GRID, (4, TEXT))
    with openvsa.sparsify(model, density=0.3, tile=(1, 2, 2), min_tokens=0):
        for block in model.transformer_blocks:
            block.attn.register_forward_pre_hook(mask_the_first_token, with_kwargs=True)
            block.compile(backend="aot_eager", fullgraph=True)
        with pytest.raises(UnsupportedError, match=r"not that of padded text with \(6, 11\) valid tokens"):
            run(model, inputs)


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_an_error_in_a_processor_goes_through_and_nothing_is_run_again(error: type[Exception]) -> None:
    model, inputs = build(), call(GRID, (4, TEXT))
    calls: list[nn.Module] = []

    def fail(module: nn.Module, *_: Any) -> None:
        calls.append(module)
        raise error("no luck")

    model.transformer_blocks[0].attn.to_k.register_forward_pre_hook(fail)
    openvsa.sparsify(model, density=0.3, tile=(1, 2, 2), min_tokens=0)
    with pytest.raises(error, match="no luck"):
        run(model, inputs)
    assert len(calls) == 1


def test_an_attention_backend_that_reads_the_mask_is_refused_as_any_other() -> None:
    model, inputs = build(), call(GRID, (4, TEXT))
    dense = run(model, inputs)
    config = SparsityConfig(density=0.3, tile=(1, 2, 2), min_tokens=0)
    with openvsa.sparsify(model, config=config) as handle, attention_backend("flex"):
        with pytest.raises(UnsupportedError, match=r"backend does not go through.*set_attention_backend"):
            run(model, inputs)
        handle.config = replace(config, strict=False)
        with pytest.warns(UserWarning, match="backend does not go through"):
            close(run(model, inputs), dense)
        assert [layer.sparse_calls for layer in handle.report().layers] == [0, 0]


def test_tokens_are_reordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hoist(build(), call((3, 4, 6), (4, TEXT), image=True), monkeypatch)
