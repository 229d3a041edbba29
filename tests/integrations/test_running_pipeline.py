"""Steps told by the pipeline that runs, in pipelines of our own, so that each way to call a transformer can be had."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch._dynamo.utils import counters

import openvsa
from openvsa import SparsityConfig
from openvsa.integrations.report import AttentionEvent
from tiny_wan import run, text, tiny_wan


class TwoExperts(DiffusionPipeline):
    """Wan 2.2: the second half of the steps has a transformer of its own."""

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module) -> None:
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)

    def __call__(self, steps: int = 6, grids: Any = ((3, 5, 7),), after: Callable[[int], Any] = lambda _: None) -> None:
        self.scheduler.set_timesteps(steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            model = self.transformer if index < steps // 2 else self.transformer_2
            for grid in grids:
                noise = run(model, float(timestep), self.prompt, grid)
            self.scheduler.step(noise, timestep, torch.zeros_like(noise))
            after(index)

    prompt = text()

    @property
    def num_timesteps(self) -> int | None:
        return self._num_timesteps

    _num_timesteps: int | None = None


SETTINGS = SparsityConfig(density=0.2, tile=(1, 2, 2), min_tokens=0, dense_first_steps=2, steps={4: 0.7})


def watch(handle: Any, events: list[AttentionEvent]) -> Any:
    handle.on_attention(lambda event: events.append(event) if event.name.endswith("blocks.0.attn1") else None)
    return handle


def shares(events: list[AttentionEvent]) -> list[tuple[int, float]]:
    return [(event.step, 1.0 if event.plan is None else round(event.plan.density, 1)) for event in events]


def test_a_handle_for_each_expert_knows_the_step() -> None:
    pipe, events = TwoExperts(tiny_wan(), tiny_wan()), []
    expected = [(0, 1.0), (1, 1.0), (2, 0.2), (3, 0.2), (4, 0.7), (5, 0.2)]
    with watch(openvsa.sparsify(pipe.transformer, config=SETTINGS), events):
        with watch(openvsa.sparsify(pipe.transformer_2, config=SETTINGS), events):
            pipe()
            assert shares(events) == expected
            pipe()
    assert shares(events) == 2 * expected


def test_a_handle_that_is_made_between_steps_knows_the_step() -> None:
    pipe, events = TwoExperts(tiny_wan(), tiny_wan()), []
    handles = []

    def attach(index: int) -> None:
        if index == 0:
            handles.append(watch(openvsa.sparsify(pipe, config=SETTINGS), events))

    pipe(after=attach)
    assert shares(events) == [(1, 1.0), (2, 0.2), (3, 0.2), (4, 0.7), (5, 0.2)]


def test_lattices_of_several_sizes_share_a_step() -> None:
    pipe, events = TwoExperts(tiny_wan(), tiny_wan()), []
    with watch(openvsa.sparsify(pipe, config=SETTINGS), events):
        pipe(grids=((3, 5, 7), (3, 5, 6)))
    assert [step for step, _ in shares(events)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [share < 1 for _, share in shares(events)] == [False] * 4 + [True] * 8


def test_one_transformer_for_all_noise_levels() -> None:
    """A Wan 2.2 pipeline may be given one merged model as both experts."""
    model, events = tiny_wan(), []
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), min_tokens=0, dense_layers=(0,))
    with openvsa.sparsify(model, config=config):
        expected = run(model)
    with openvsa.sparsify(TwoExperts(model, model), config=config) as handle:
        handle.on_attention(events.append)
        assert torch.equal(run(model), expected)
    assert [(event.name, event.plan is None) for event in events] == [
        ("blocks.0.attn1", True),
        ("blocks.1.attn1", False),
    ]


def test_steps_with_densities_of_their_own_choose_anew() -> None:
    model, prompt, events = tiny_wan(), text(), []
    steps = {2: 0.6, 3: 1.0}
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), min_tokens=0, reuse_steps=4, steps=steps)
    with watch(openvsa.sparsify(model, config=config), events):
        for level in (900.0, 800.0, 700.0, 600.0, 500.0, 400.0):
            run(model, level, prompt)
    assert [share for _, share in shares(events)] == [0.2, 0.2, 0.6, 1.0, 0.2, 0.2]
    plans = [event.plan for event in events]
    assert plans[0] is plans[1] is not plans[4] is plans[5]


def test_compiled_blocks_with_kept_plans_have_no_graph_for_each_batch() -> None:
    model = tiny_wan()
    openvsa.sparsify(model, config=SparsityConfig(density=0.2, min_tokens=0, reuse_steps=2))
    prompts = [text(batch) for batch in range(1, 6)]
    eager = [run(model, level, prompt) for prompt in prompts for level in (900.0, 700.0)]
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = [run(model, level, prompt) for prompt in prompts for level in (900.0, 700.0)]
    torch.testing.assert_close(compiled, eager)
    assert counters["stats"]["unique_graphs"] <= 4


def test_a_loop_that_is_shorter_than_the_generation_before() -> None:
    """Then the pipeline's number of timesteps is that of the longer one."""
    pipe, events = TwoExperts(tiny_wan(), tiny_wan()), []
    pipe._num_timesteps = 12
    pipe.scheduler.set_timesteps(8)
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), min_tokens=0, dense_last_steps=2)
    with watch(openvsa.sparsify(pipe, config=config), events):
        for timestep in pipe.scheduler.timesteps:
            run(pipe.transformer, float(timestep))
    assert [step for step, share in shares(events) if share == 1] == [6, 7]


def test_a_loss_on_a_hidden_state_with_checkpointing() -> None:
    """Its backward pass computes layers again, and never passes the output."""
    model = tiny_wan().train()
    model.enable_gradient_checkpointing()
    states: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: states.append(output))
    with openvsa.sparsify(model, density=0.3, min_tokens=0):
        model(torch.randn(1, 4, 3, 10, 14), torch.tensor([5.0]), text())
        states[0].square().mean().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_a_prompt_that_follows_another_is_no_fault() -> None:
    model = tiny_wan()
    with openvsa.sparsify(model, config=SparsityConfig(density=0.2, min_tokens=0, reuse_steps=3)):
        for levels in ((900.0, 800.0), (700.0, 600.0)):
            prompt = text()
            for level in levels:
                run(model, level, prompt)
            del prompt


def test_prompts_that_are_made_anew_in_every_step_are_told() -> None:
    model, prompt = tiny_wan(), text()
    config = SparsityConfig(density=0.2, min_tokens=0, reuse_steps=3)
    with openvsa.sparsify(model, config=config):
        run(model, 900.0, prompt.clone())
        with pytest.warns(UserWarning, match="reuse_steps is 3, but no plan can be used again: every forward is given"):
            run(model, 800.0, prompt.clone())
        run(model, 700.0, prompt.clone())  # told once, and pytest makes other warnings errors
        for level in (990.0, 800.0, 700.0):
            run(model, level, prompt)


@pytest.mark.parametrize("first", [0, 1])
def test_variables_of_callers_are_let_go(first: int) -> None:
    """Reading the variables of a frame keeps them, before Python 3.13, for as long as it runs."""

    class Server:
        def serve(self) -> None:
            large = torch.zeros(3)
            seen = weakref.ref(large)
            run(model)
            del large
            assert seen() is None

    model = tiny_wan()
    with openvsa.sparsify(model, config=SparsityConfig(density=0.2, min_tokens=0, dense_first_steps=first)):
        Server().serve()


def test_a_detached_handle_reports_and_lets_the_model_go() -> None:
    model = tiny_wan()
    with openvsa.sparsify(model, density=0.3, min_tokens=0) as handle:
        run(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert [layer.sparse_calls for layer in handle.report().layers] == [1, 1]


def test_a_layer_that_is_called_after_its_forward_is_refused() -> None:
    """Which lattice its tokens are of, and in which order, is not known there."""
    model = tiny_wan()
    with openvsa.sparsify(model, density=0.3, min_tokens=0):
        run(model)
        with pytest.raises(openvsa.OpenVSAError, match=r"blocks\.0\.attn1 ran outside its transformer's forward"):
            model.blocks[0].attn1(torch.randn(1, 105, 48))


def test_wrong_calls_are_answered_by_the_model() -> None:
    model, latents = tiny_wan(), torch.randn(1, 4, 3, 10, 14)
    with openvsa.sparsify(model, density=0.3, min_tokens=0):
        with pytest.raises(TypeError, match="positional arguments but"):
            model(latents, torch.tensor([5.0]), text(), None, True, None, "extra", "more")
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'encoder_hidden_states'"):
            model(latents, torch.tensor([5.0]))
        run(model)


def test_sums_of_a_report_do_not_stand_still() -> None:
    """As in fp32 after a million calls."""
    model = tiny_wan()
    with openvsa.sparsify(model, density=0.3, min_tokens=0) as handle:
        run(model)
        once = handle.report().layers[0]
        tally = handle._session.tallies[0]
        many = 10_000_000
        tally.delivered, tally.executed = tally.delivered * many, tally.executed * many
        tally.calls = tally.sparse_calls = many
        run(model)
        layer = handle.report().layers[0]
    assert layer.delivered_density == pytest.approx(once.delivered_density, rel=1e-12)
    assert float(tally.delivered) - once.delivered_density * many == pytest.approx(once.delivered_density, rel=1e-6)
    assert layer.executed_density == pytest.approx(once.executed_density, rel=1e-12)
