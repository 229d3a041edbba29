"""What depends on the denoising step: dense steps, densities by step, plans that serve several steps."""

from __future__ import annotations

import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import openvsa
from openvsa import SparsityConfig
from openvsa.integrations.report import AttentionEvent
from openvsa.integrations.steps import StepClock
from tiny_wan import run, text, tiny_wan

LEVELS = (900.0, 700.0, 500.0, 300.0, 100.0)


def densities(handle: Any, model: Any, levels: Any, prompts: Any = None) -> list[float]:
    """The density of the first layer in each forward."""
    events: list[AttentionEvent] = []
    handle.on_attention(events.append)
    for level in levels:
        for prompt in prompts or [text()]:
            run(model, level, prompt)
    return [round(e.plan.density, 3) if e.plan else 1.0 for e in events if e.layer == 0]


def test_the_clock_goes_by_level_alone() -> None:
    clock = StepClock()
    said = []
    for level, grid in [(9, (2, 2)), (9, (2, 2)), (5, (2, 2)), (1, (2, 2)), (8, (2, 2)), (3, (2, 2)), (3, (3, 2))]:
        fresh = clock.tick(level, grid)
        said.append((clock.step, fresh))
    assert said == [(0, True), (0, False), (1, False), (2, False), (0, True), (1, False), (0, True)]


def test_another_schedule_begins_a_generation() -> None:
    """Also at a noise level that would be the next step of the one before."""
    clock, first, second = StepClock(), torch.tensor([9, 5]), torch.tensor([9, 5])

    def tick(level: int, schedule: Tensor) -> bool:
        return clock.tick(level, (2, 2), SimpleNamespace(scheduler=SimpleNamespace(timesteps=schedule)))

    said = [tick(level, of) for level, of in ((9, first), (5, first), (5, second), (1, second))]
    assert said == [True, False, True, False]
    assert clock.step == 1
    del second
    assert tick(0, torch.tensor([9, 5]))


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_steps_whose_levels_are_rounded_to_one_are_told_apart(kind: str) -> None:
    """As by the pipelines of HunyuanVideo, Flux and Kandinsky 5, which give bfloat16 timesteps."""
    model, prompt = tiny_wan(), text()
    scheduler = getattr(diffusers, kind)(shift=12.0)
    scheduler.set_timesteps(50)
    exact, rounded = scheduler.timesteps, scheduler.timesteps.bfloat16()
    assert len(rounded.unique()) < len(exact.unique()) == 50
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), dense_first_steps=3, dense_last_steps=2)
    events: list[AttentionEvent] = []
    dense_steps, seen, x = set(), set(), torch.zeros(1, 3)
    with openvsa.sparsify(pipe, config=config) as handle:
        handle.on_attention(events.append)
        for timestep, level in zip(exact, rounded, strict=True):
            for guided in (prompt, text(seed=1)):
                run(model, float(level), guided)
            if any(event.plan is None for event in events):
                dense_steps.add(float(timestep))
            seen.update((event.step, float(timestep)) for event in events)
            events.clear()
            x = scheduler.step(x, timestep, x).prev_sample
    levels = exact.unique()
    assert seen == {(step, float(t)) for step, t in enumerate(levels.flip(0))}
    assert dense_steps == {float(t) for t in (*levels[-3:], *levels[:2])}


def test_dense_first_steps_are_bit_identical_and_begin_again_with_a_generation() -> None:
    model = tiny_wan()
    dense = {level: run(model, level) for level in LEVELS}
    with openvsa.sparsify(model, config=SparsityConfig(density=0.2, tile=(1, 2, 2), dense_first_steps=2)):
        for _ in range(2):
            # Guidance as two forwards a step does not count twice.
            same = [[torch.equal(run(model, level), dense[level]) for _ in range(2)] for level in LEVELS]
            assert same == [[True] * 2] * 2 + [[False] * 2] * 3


def test_dense_last_steps_need_the_scheduler() -> None:
    model = tiny_wan()
    dense = {level: run(model, level) for level in LEVELS}
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), dense_last_steps=1)
    with pytest.raises(openvsa.UnsupportedError, match="give sparsify the pipeline"):
        openvsa.sparsify(model, config=config)
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=torch.tensor(LEVELS)))
    with openvsa.sparsify(pipe, config=config) as handle:
        found = densities(handle, model, LEVELS)
        assert [one == 1 for one in found] == [False] * 4 + [True]
        pipe.num_timesteps = 3  # video to video, begun midway
        same = [torch.equal(run(model, level), dense[level]) for level in LEVELS[2:]]
        assert same == [False, False, True]
        del pipe.num_timesteps
        # The scheduler counts that the pipeline has at the time.
        pipe.scheduler = SimpleNamespace(timesteps=torch.tensor(LEVELS[:2]))
        assert [torch.equal(run(model, level), dense[level]) for level in LEVELS[:2]] == [False, True]
        pipe.scheduler = None
        with pytest.raises(openvsa.UnsupportedError, match="or its scheduler, is gone"):
            run(model, 900.0)


def test_a_scheduler_that_has_ended_its_generation_says_nothing_about_the_next() -> None:
    """As that of a pipeline whose transformer another one uses with a scheduler of its own."""
    model = tiny_wan()
    dense = {level: run(model, level) for level in LEVELS}
    scheduler = SimpleNamespace(timesteps=torch.tensor(LEVELS), step_index=len(LEVELS))
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    with openvsa.sparsify(pipe, config=SparsityConfig(density=0.2, tile=(1, 2, 2), dense_last_steps=1)):
        same = [torch.equal(run(model, level), dense[level]) for level in LEVELS]
    assert same == [False] * 4 + [True]


@pytest.mark.parametrize(("first", "last", "warned"), [(4, 0, False), (5, 0, True), (3, 2, True), (10, 0, True)])
def test_a_generation_without_a_sparse_step_says_so(first: int, last: int, warned: bool) -> None:
    """As a preset for the pipeline's usual number of steps in a generation of few."""
    model = tiny_wan()
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=torch.tensor(LEVELS)))
    config = SparsityConfig(density=0.2, tile=(1, 2, 2), dense_first_steps=first, dense_last_steps=last)
    with openvsa.sparsify(pipe, config=config), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for level in LEVELS:
            run(model, level)
    said = [str(one.message) for one in caught]
    expected = f"all 5 steps of this generation stay dense: dense_first_steps is {first} and dense_last_steps {last};"
    assert [message.startswith(expected) for message in said] == [True] * warned


def test_densities_by_step_and_by_layer() -> None:
    model = tiny_wan()
    blocks = 3 * 3 * 4
    config = SparsityConfig(
        density=0.5, tile=(1, 2, 2), steps={1: 0.25}, layers={"blocks.1.attn1": (0.25, 0.75)}, dense_layers=()
    )
    events: list[AttentionEvent] = []
    with openvsa.sparsify(model, config=config) as handle:
        handle.on_attention(events.append)
        for level in LEVELS[:3]:
            run(model, level)
        report = handle.report()
    kept = [[int(n) for n in event.plan.kv_num_blocks[0, :, 0]] for event in events]  # type: ignore[union-attr]
    half, quarter = blocks // 2, blocks // 4
    assert kept == [[half] * 2, [quarter, 27], [quarter] * 2, [quarter, 27], [half] * 2, [quarter, 27]]
    assert [layer.requested_density for layer in report.layers] == pytest.approx([1.25 / 3, 0.5])


def test_dense_layers_by_number_and_name() -> None:
    model = tiny_wan(3)
    events: list[AttentionEvent] = []
    with openvsa.sparsify(model, config=SparsityConfig(density=0.5, dense_layers=(-1, "blocks.0.attn1"))) as handle:
        handle.on_attention(events.append)
        run(model)
        assert [event.plan is None for event in events] == [True, False, True]
        assert [layer.sparse_calls for layer in handle.report().layers] == [0, 1, 0]
        for wrong in ({"dense_layers": (3,)}, {"dense_layers": ("attn",)}, {"layers": {"blocks.9.attn1": 0.5}}):
            with pytest.raises(openvsa.OpenVSAError, match="has no layers"):
                handle.config = SparsityConfig(density=0.5, **wrong)
        with pytest.raises(openvsa.BudgetError, match=r"blocks\.1\.attn1 has 2 heads, but the settings have 3"):
            handle.config = SparsityConfig(density=0.5, layers={"blocks.1.attn1": (0.5, 0.5, 0.5)})


def plans_made(config: SparsityConfig, forwards: list[tuple[float, Any, tuple[int, int, int]]]) -> list[bool]:
    """For each forward whether the first layer made a plan of its own, rather than use an earlier one."""
    model = tiny_wan()
    made: list[bool] = []
    seen: list[Any] = []
    with openvsa.sparsify(model, config=config) as handle:

        def note(event: AttentionEvent) -> None:
            if event.layer == 0:
                made.append(not any(event.plan is plan for plan in seen))
                seen.append(event.plan)

        handle.on_attention(note)
        for level, prompt, grid in forwards:
            run(model, level, prompt, grid)
    return made


def test_plans_serve_several_steps_of_their_own_branch() -> None:
    positive, negative = text(seed=3), text(seed=4)
    small = (3, 4, 6)
    config = SparsityConfig(density=0.3, tile=(1, 2, 2), reuse_steps=2)
    split = [(level, prompt, small) for level in LEVELS for prompt in (positive, negative)]
    assert plans_made(config, split) == [True, True, False, False] * 2 + [True, True]
    # A new generation, another lattice, another batch, and texts that are not those of the step before begin anew.
    again = [(900.0, positive, small), (700.0, positive, small), (800.0, positive, small)]
    assert plans_made(config, again) == [True, False, True]
    assert plans_made(config, [(900.0, positive, small), (700.0, positive, (3, 5, 7))]) == [True, True]
    assert plans_made(config, [(900.0, positive, small), (700.0, text(2), small)]) == [True, True]
    assert plans_made(config, [(900.0, positive, small), (700.0, positive.clone(), small)]) == [True, True]


def test_dense_steps_do_not_use_up_what_plans_serve() -> None:
    prompt, small = text(), (3, 4, 6)
    config = SparsityConfig(density=0.3, tile=(1, 2, 2), dense_first_steps=1, reuse_steps=2)
    model, events = tiny_wan(), list[AttentionEvent]()
    with openvsa.sparsify(model, config=config) as handle:
        handle.on_attention(events.append)
        for level in LEVELS:
            run(model, level, prompt, small)
    dense, *plans = [event.plan for event in events if event.layer == 0]
    assert dense is None
    assert plans[0] is plans[1] is not plans[2]
    assert plans[2] is plans[3]


def test_plans_do_not_outlive_a_generation_of_one_step() -> None:
    """The caller may keep the prompt, and the next generation begins at the same noise level."""
    prompt, small = text(), (3, 4, 6)
    config = SparsityConfig(density=0.3, tile=(1, 2, 2), reuse_steps=2)
    assert plans_made(config, [(900.0, prompt, small)] * 3) == [True] * 3


@pytest.mark.parametrize("how", ["the prompt is gone", "detached"])
def test_plans_are_not_kept_longer_than_they_serve(how: str) -> None:
    """They may be gigabytes, which the decoder of the video wants."""
    model, prompt = tiny_wan(), text()
    plans: list[weakref.ref[Any]] = []
    handle = openvsa.sparsify(model, config=SparsityConfig(density=0.3, tile=(1, 2, 2), reuse_steps=3))
    handle.on_attention(lambda event: plans.append(weakref.ref(event.plan)))
    run(model, 900.0, prompt)
    assert len(plans) == 2
    assert all(plan() is not None for plan in plans)
    if how == "detached":
        handle.detach()
    else:
        del prompt
    assert all(plan() is None for plan in plans)


def test_the_pipeline_is_not_kept_alive() -> None:
    class Pipe:
        transformer, scheduler = tiny_wan(), SimpleNamespace(timesteps=torch.tensor(LEVELS))

    pipe = Pipe()
    gone = weakref.ref(pipe)
    with openvsa.sparsify(pipe, config=SparsityConfig(density=0.3, dense_last_steps=1)):
        del pipe
        assert gone() is None


def test_reused_plans_are_those_of_the_step_that_made_them() -> None:
    model, prompt = tiny_wan(), text()
    with openvsa.sparsify(model, config=SparsityConfig(density=0.3, tile=(1, 2, 2), reuse_steps=3)) as handle:
        events: list[AttentionEvent] = []
        handle.on_attention(events.append)
        run(model, 900, prompt)
        run(model, 800, prompt)
    assert events[0].plan is events[2].plan
    assert events[1].plan is events[3].plan
    assert events[0].plan is not events[1].plan
    assert not torch.equal(events[0].q, events[2].q)


def test_steps_have_no_meaning_in_training() -> None:
    model = tiny_wan().train()
    openvsa.sparsify(model, config=SparsityConfig(density=0.3, dense_first_steps=1))
    with pytest.raises(openvsa.UnsupportedError, match="are for generation"):
        model(torch.randn(1, 4, 2, 4, 4), torch.tensor([5.0]), text())


def test_two_transformers_share_the_steps_and_have_names_of_their_own() -> None:
    high, low = tiny_wan(), tiny_wan()
    pipe = SimpleNamespace(transformer=high, transformer_2=low)
    config = SparsityConfig(
        density=0.3, tile=(1, 2, 2), dense_first_steps=1, layers={"transformer_2.blocks.0.attn1": 1.0}
    )
    with openvsa.sparsify(pipe, config=config) as handle:
        run(high, 900)
        run(high, 800)
        run(low, 300)
        report = handle.report()
    assert [(layer.name, layer.calls, layer.sparse_calls) for layer in report.layers] == [
        ("blocks.0.attn1", 2, 1),
        ("blocks.1.attn1", 2, 1),
        ("transformer_2.blocks.0.attn1", 1, 0),
        ("transformer_2.blocks.1.attn1", 1, 1),
    ]
