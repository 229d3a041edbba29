"""Diffusers' guiders that run a prompt again with a model made weaker, by hooks they put in place for that forward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import Tensor

import openvsa
from openvsa import SparsityConfig
from tiny_wan import run, text, tiny_wan


def without_a_layer() -> Any:
    return SkipLayerGuidance(
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig([1], fqn="blocks"),
    )


def generate(model: Any, guider: Any, levels: tuple[float, ...] = (700.0, 690.0)) -> list[Tensor]:
    """The output of every forward: with the prompt, with the negative prompt, and with the prompt again."""
    outputs, prompts = [], (text(), text(seed=3))
    for step, level in enumerate(levels, 1):  # Diffusers leaves the first step out
        guider.set_state(step=step, num_inference_steps=len(levels) + 2, timestep=torch.tensor(level))
        for branch in guider.prepare_inputs({"prompt": prompts}):
            guider.prepare_models(model)
            outputs.append(run(model, level, branch.prompt))
            guider.cleanup_models(model)
    assert len(outputs) == 3 * len(levels)
    return outputs


def test_the_weaker_model_is_what_it_was() -> None:
    model = tiny_wan()
    dense = generate(model, without_a_layer())
    assert not torch.equal(dense[0], dense[2])
    with openvsa.sparsify(model, density=1.0):
        for ours, theirs in zip(generate(model, without_a_layer()), dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_weaker_model_has_plans_of_its_own() -> None:
    model, plans = tiny_wan(), []
    with openvsa.sparsify(model, config=SparsityConfig(density=0.2, tile=(1, 2, 2), reuse_steps=2)) as handle:
        handle.on_attention(lambda event: plans.append(event.plan) if event.layer == 0 else None)
        generate(model, without_a_layer())
    assert len({id(plan) for plan in plans[:3]}) == 3
    assert all(now is before for now, before in zip(plans[3:], plans[:3], strict=True))


def test_values_in_place_of_attention() -> None:
    """What PerturbedAttentionGuidance does, where Diffusers knows the processors. It leaves nothing to make sparse."""

    def skipping() -> Any:
        model = tiny_wan()
        hook = AttentionProcessorSkipHook(lambda *_: None, skip_attention_scores=True)
        HookRegistry.check_if_exists_or_initialize(model.blocks[1].attn1).register_hook(hook, "skip")
        return model

    model = skipping()
    dense = run(model)
    assert not torch.allclose(dense, run(tiny_wan()))
    with openvsa.sparsify(model, density=1.0) as handle:
        torch.testing.assert_close(run(model), dense, rtol=1e-4, atol=1e-5)
        assert handle._session.forward.hoisted
        assert [layer.name for layer in handle.report().layers] == ["blocks.0.attn1"]
