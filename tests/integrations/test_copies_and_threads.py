"""Attached models that are copied, shared by threads and pipelines, traced, or changed between forward and backward."""

from __future__ import annotations

import copy
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import openvsa
from openvsa import BlockPlan, Budget, OpenVSAError, SparsityConfig, TileLayout, UnsupportedError
from tiny_wan import run, text, tiny_wan

LATENTS = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(1))


def attach(model: Any, **changes: Any) -> Any:
    return openvsa.sparsify(model, config=SparsityConfig(density=0.2, tile=(1, 2, 2), **changes))


def forward(model: nn.Module, latents: Tensor = LATENTS, level: float = 300.0) -> Tensor:
    return model(latents, torch.tensor([level]), text())[0]


# -- copies -----------------------------------------------------------------------------------------------------


def test_what_has_run_does_not_keep_a_model_from_being_copied() -> None:
    """A GPU's events and tensors with gradients know no copy."""
    model = tiny_wan()
    handle = attach(model)
    level = torch.tensor([300.0], requires_grad=True) * 1.0
    expected = model(LATENTS, level, text())[0]
    handle._session.tallies[0].pending.append((torch.Event(), torch.Event()))  # pyright: ignore[reportArgumentType]
    assert torch.equal(forward(copy.deepcopy(model)), expected)


def test_a_handle_that_is_copied_with_its_model_holds_the_copy() -> None:
    model = tiny_wan()
    dense = run(model)
    handle = attach(model)
    sparse = run(model)
    twin, hold = copy.deepcopy((model, handle))
    assert hold.report().layers == ()
    hold.detach()
    assert torch.equal(run(twin), dense)
    assert torch.equal(run(model), sparse)


def test_a_copied_pipeline_counts_its_own_steps() -> None:
    """Its original may be at another generation, or gone."""

    class Pipeline:
        def __init__(self, transformer: WanTransformer3DModel) -> None:
            self.transformer = transformer
            self.scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0, 100.0]))

    def sparse_steps(pipe: Pipeline) -> list[bool]:
        kept = []
        for level in pipe.scheduler.timesteps.tolist():
            run(pipe.transformer, level)
            kept.append(not pipe.transformer.blocks[0].attn1.processor.why_dense)
        return kept

    pipe = Pipeline(tiny_wan())
    attach(pipe, dense_last_steps=1)
    assert sparse_steps(pipe) == [True, True, False]
    twin = copy.deepcopy(pipe)
    twin.scheduler.timesteps = torch.tensor([900.0, 100.0])
    assert sparse_steps(twin) == [True, False]
    del pipe
    assert sparse_steps(twin) == [True, False]


# -- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["patch_embedding", "blocks.1", "proj_out"])
def test_two_threads_in_one_model_are_refused(layer: str) -> None:
    """Lattices of as many tokens: nothing else would tell."""
    model = tiny_wan()
    attach(model)
    expected = run(model, grid=(3, 7, 5))
    outs: list[Tensor] = []

    def other(*_: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=lambda: outs.append(run(model, grid=(3, 7, 5))))
        thread.start()
        thread.join()

    hook = model.get_submodule(layer).register_forward_pre_hook(other)
    with pytest.raises(OpenVSAError, match=r"another thread has begun .* hold a lock .* model of its own"):
        run(model, grid=(3, 5, 7))
    assert torch.equal(outs[0], expected)
    assert torch.equal(run(model, grid=(3, 7, 5)), expected)


def test_a_backward_pass_may_run_in_another_thread() -> None:
    model = tiny_wan().train()
    model.enable_gradient_checkpointing()
    attach(model)
    weight = model.blocks[0].attn1.to_k.weight
    (expected,) = torch.autograd.grad(forward(model).square().sum(), weight)
    thread = threading.Thread(target=forward(model).square().sum().backward)
    thread.start()
    thread.join()
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


# -- tensors without values, and tracers ------------------------------------------------------------------------


def test_tensors_without_values_leave_no_trace_in_the_report() -> None:
    model = tiny_wan()
    handle = attach(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert forward(model, torch.randn(1, 4, 3, 10, 14)).shape == LATENTS.shape
    empty = copy.deepcopy(model).to("meta")
    out = empty(LATENTS.to("meta"), torch.tensor([300.0], device="meta"), text().to("meta"))[0]
    assert (out.device.type, out.shape) == ("meta", LATENTS.shape)
    run(model)
    assert [layer.calls for layer in handle.report().layers] == [1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated")
def test_what_cannot_see_through_a_sparse_model_is_refused() -> None:
    model = tiny_wan()
    with attach(model):
        with pytest.raises(UnsupportedError, match=r"torch\.func .* cannot see through sparse attention"):
            torch.func.vmap(partial(forward, model), randomness="same")(LATENTS[None])
        with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace cannot see .* use torch\.export"):
            torch.jit.trace(lambda x: forward(model, x), (LATENTS,))
        program = torch.export.export(model, (LATENTS, torch.tensor([300.0]), text()))
        torch.testing.assert_close(program.module()(LATENTS, torch.tensor([300.0]), text())[0], forward(model))
    assert torch.func.vmap(partial(forward, model), randomness="same")(LATENTS[None]).shape == (1, *LATENTS.shape)


# -- between a forward and its backward pass --------------------------------------------------------------------


def everything(q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
    return BlockPlan.dense(layout.q_blocks, layout.blocks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_settings_are_those_of_the_forward_when_its_layers_are_computed_again(reentrant: bool) -> None:
    model = tiny_wan().train()
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    weight = model.blocks[0].attn1.to_k.weight
    latents = LATENTS.clone().requires_grad_()
    handle = attach(model)

    def gradient(between: Any) -> Tensor:
        model.zero_grad()
        loss = forward(model, latents).square().sum()
        between()
        loss.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    def settle() -> None:
        handle.config = SparsityConfig(density=0.5, tile=(3, 1, 1), selector=everything)

    expected = gradient(lambda: None)
    assert torch.equal(gradient(settle), expected)
    with pytest.raises(OpenVSAError, match="detached between a forward and its backward pass"):
        gradient(handle.detach)


def test_a_backward_pass_without_checkpointing_needs_no_handle() -> None:
    model = tiny_wan().train()
    handle = attach(model)
    weight = model.blocks[0].attn1.to_k.weight
    (expected,) = torch.autograd.grad(forward(model).square().sum(), weight)
    loss = forward(model).square().sum()
    handle.detach()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_of_what_wraps_a_model_the_model_inside_is_asked_for() -> None:
    class DistributedDataParallel(nn.Module):
        pass

    with pytest.raises(UnsupportedError, match="such as DistributedDataParallel or PeftModel, give the model inside"):
        attach(DistributedDataParallel())
