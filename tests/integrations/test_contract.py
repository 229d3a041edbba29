"""What the integration relies on in Diffusers. A release that moves any of it fails here, by name.

Run also with the oldest Diffusers that pyproject.toml allows.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache, apply_layerwise_casting
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from openvsa.integrations.families import family_of, supported
from openvsa.integrations.intercept import Interception
from openvsa.integrations.site import _TOKENWISE_HOOKS
from tiny_wan import text, tiny_wan

# What families read from a forward, and attachment from a model.
ARGUMENTS = {
    "WanTransformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states"},
    "WanVACETransformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states", "control_hidden_states"},
    "WanAnimateTransformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states"},
    "HunyuanVideoTransformer3DModel": {"hidden_states", "timestep", "encoder_attention_mask"},
    "HunyuanVideo15Transformer3DModel": {
        "hidden_states",
        "timestep",
        "encoder_attention_mask",
        "encoder_attention_mask_2",
        "image_embeds",
    },
    "CogVideoXTransformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states"},
    "MochiTransformer3DModel": {"hidden_states", "timestep", "encoder_attention_mask"},
    "FluxTransformer2DModel": {"hidden_states", "timestep", "img_ids"},
    "Flux2Transformer2DModel": {"hidden_states", "timestep", "img_ids"},
    "LTXVideoTransformer3DModel": {"hidden_states", "timestep", "num_frames", "height", "width", "video_coords"},
    "LTX2VideoTransformer3DModel": {"hidden_states", "timestep", "num_frames", "height", "width", "video_coords"},
    "CosmosTransformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states"},
    "Kandinsky5Transformer3DModel": {"hidden_states", "timestep", "encoder_hidden_states"},
}


def test_every_family_is_in_the_table() -> None:
    assert set(ARGUMENTS) == set(supported())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_forwards_have_the_arguments_that_are_read(name: str) -> None:
    assert set(inspect.signature(getattr(diffusers, name).forward).parameters) >= ARGUMENTS[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_family_of_a_class_and_of_its_subclasses(name: str) -> None:
    kind = getattr(diffusers, name)
    bare, mine = (one.__new__(one) for one in (kind, type("Mine", (kind,), {})))
    assert type(family_of(bare)) is type(family_of(mine))


def test_wan_has_the_places_where_tokens_enter_and_leave() -> None:
    model = tiny_wan()
    hoist = family_of(model).hoist(model)
    assert hoist is not None
    shapes: dict[Any, list[tuple[int, ...]]] = {}
    for module in (*(entry[0] for entry in hoist.entries), hoist.exit[0]):

        def note(module: Any, args: Any, output: Any) -> None:
            shapes[module] = [tuple(x.shape) for x in (output if isinstance(output, tuple) else (output,))]

        module.register_forward_hook(note)
    model(torch.randn(1, 4, 3, 10, 14), torch.tensor([5.0]), text())
    assert shapes[model.rope] == [(1, 105, 1, 24)] * 2
    assert shapes[model.patch_embedding] == [(1, 48, 3, 5, 7)]
    assert shapes[model.proj_out] == [(1, 105, 16)]
    assert model.is_cache_enabled is False


def test_caches_and_other_hooks_are_found_at_the_modules() -> None:
    model = tiny_wan()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    found = {
        type(hook).__module__
        for module in model.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks.values()
    }
    assert found == {"diffusers.hooks.first_block_cache", "diffusers.hooks.layerwise_casting"}
    assert all(importlib.import_module(name) for name in _TOKENWISE_HOOKS)


def test_wan_processors_end_in_one_attention_call() -> None:
    model = tiny_wan()
    attn = model.blocks[0].attn1
    assert isinstance(attn, AttentionModuleMixin)
    assert list(inspect.signature(attn.processor.__call__).parameters) == [
        "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb",
    ]  # fmt: skip
    assert attn.processor._attention_backend is None
    assert attn.processor._parallel_config is None
    calls: list[tuple[int, ...]] = []

    def answer(index: int, **call: Any) -> Tensor:
        calls.append(tuple(call["query"].shape))
        return call["value"]

    with Interception(answer):
        attn(torch.randn(1, 105, 48))
    assert calls == [(1, 2, 105, 24)]


def test_the_dispatcher_reaches_pytorch_with_its_heads_before_its_tokens() -> None:
    q = torch.randn(1, 5, 2, 4)
    seen: list[dict[str, Any]] = []

    def answer(index: int, **call: Any) -> Tensor:
        seen.append(call)
        return call["value"]

    with Interception(answer):
        out = dispatch_attention_fn(q, q, q, scale=0.5)
    assert [tuple(call["query"].shape) for call in seen] == [(1, 2, 5, 4)]
    assert seen[0]["scale"] == 0.5
    assert torch.equal(out, q)
