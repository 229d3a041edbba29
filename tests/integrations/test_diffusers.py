"""sparsify, observe and detach on a tiny random Wan transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import openvsa
from openvsa.integrations.diffusers import observe
from openvsa.integrations.report import AttentionEvent


@pytest.fixture
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()


def run(model: nn.Module, grid: tuple[int, int, int] = (5, 7, 9), batch: int = 2) -> Tensor:
    """The model's output on latents whose token lattice is `grid`."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    latents = torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator)
    text = torch.randn(batch, 3, 16, generator=generator)
    with torch.no_grad():
        return model(hidden_states=latents, timestep=torch.full((batch,), 500.0), encoder_hidden_states=text)[0]


@pytest.mark.parametrize("grid", [(5, 7, 9), (1, 1, 1), (3, 4, 16)])
def test_density_one_equals_dense(model: WanTransformer3DModel, grid: tuple[int, int, int]) -> None:
    dense = run(model, grid)
    openvsa.sparsify(model, density=1.0)
    torch.testing.assert_close(run(model, grid), dense, rtol=1e-5, atol=2e-6)


def test_detach_restores_the_dense_output_bit_for_bit(model: WanTransformer3DModel) -> None:
    dense, processors = run(model), [block.attn1.processor for block in model.blocks]
    handle = openvsa.sparsify(model, density=0.2)
    assert not torch.equal(run(model), dense)
    handle.detach()
    handle.detach()
    assert [block.attn1.processor for block in model.blocks] == processors
    assert torch.equal(run(model), dense)


def test_the_handle_detaches_at_the_end_of_a_with_statement(model: WanTransformer3DModel) -> None:
    dense = run(model)
    with openvsa.sparsify(model, density=0.2):
        assert not torch.equal(run(model), dense)
    assert torch.equal(run(model), dense)


def test_observing_changes_nothing(model: WanTransformer3DModel) -> None:
    dense = run(model)
    events: list[AttentionEvent] = []
    with observe(model) as handle:
        handle.on_attention(events.append)
        assert torch.equal(run(model), dense)
        assert handle.report().delivered_density == 1.0
        assert handle.report().attention_seconds > 0
        with pytest.raises(openvsa.OpenVSAError, match="stays dense"):
            handle.density = 0.5
    assert [event.plan for event in events] == [None, None]


def test_resolutions_in_a_row(model: WanTransformer3DModel) -> None:
    small, large = run(model, (2, 4, 4)), run(model, (5, 7, 9))
    openvsa.sparsify(model, density=1.0)
    for grid, dense in (((2, 4, 4), small), ((5, 7, 9), large), ((2, 4, 4), small)):
        torch.testing.assert_close(run(model, grid), dense, rtol=1e-5, atol=2e-6)


def test_density_tile_and_budget_take_effect(model: WanTransformer3DModel) -> None:
    handle = openvsa.sparsify(model, density=0.25, tile=(2, 4, 4))
    run(model)
    [first, second] = handle.report().layers
    assert (first.name, first.grid, first.tile, first.calls) == ("blocks.0.attn1", (5, 7, 9), (2, 4, 4), 1)
    assert first.num_blocks == 18
    assert first.delivered_density == second.delivered_density == pytest.approx(5 / 18)
    events: list[AttentionEvent] = []
    handle.on_attention(events.append)
    handle.density = 0.5
    run(model)
    handle.budget = openvsa.Budget(top_k=2)
    run(model)
    plans = [event.plan for event in events]
    assert [plan.density for plan in plans if plan] == pytest.approx([0.5, 0.5, 2 / 18, 2 / 18])


def test_events_tell_layer_timestep_and_block_order(model: WanTransformer3DModel) -> None:
    handle = openvsa.sparsify(model, density=0.5)
    events: list[AttentionEvent] = []
    handle.on_attention(events.append)
    run(model)
    assert [(event.layer, event.name) for event in events] == [(0, "blocks.0.attn1"), (1, "blocks.1.attn1")]
    assert {event.timestep for event in events} == {500.0}
    assert events[0].q.shape == events[0].k.shape == (2, 5 * 7 * 9, 2, 24)
    plan = openvsa.BlockPlan.from_block_mask(
        openvsa.select.PooledTopK()(
            events[0].q, events[0].k, events[0].layout, openvsa.Budget(keep_ratio=0.5)
        ).block_mask(),
        events[0].layout.blocks,
        events[0].layout.blocks,
    )
    assert torch.equal(plan.kv_indices, events[0].plan.kv_indices)  # type: ignore[union-attr]


def test_gradients_reach_the_weights_as_in_the_dense_model(model: WanTransformer3DModel) -> None:
    def gradient() -> Tensor:
        model.zero_grad()
        latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        model(latents, torch.tensor([300.0]), torch.ones(1, 3, 16))[0].square().sum().backward()
        grad = model.blocks[0].attn1.to_k.weight.grad
        assert grad is not None
        return grad.clone()

    dense = gradient()
    openvsa.sparsify(model, density=1.0)
    torch.testing.assert_close(gradient(), dense, rtol=1e-4, atol=1e-6)


def test_autocast_keeps_one_dtype(model: WanTransformer3DModel) -> None:
    openvsa.sparsify(model, density=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model).isfinite().all()


def test_fused_projections(model: WanTransformer3DModel) -> None:
    dense = run(model)
    for block in model.blocks:
        block.attn1.fuse_projections()
    openvsa.sparsify(model, density=1.0)
    torch.testing.assert_close(run(model), dense, rtol=1e-5, atol=2e-6)


def test_compiled_blocks_trace_without_graph_breaks(model: WanTransformer3DModel) -> None:
    handle = openvsa.sparsify(model, density=0.3)
    eager = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), eager)
    handle.detach()


def test_a_pipeline_is_entered_through_its_transformers(model: WanTransformer3DModel) -> None:
    class Pipe:
        transformer = model

    handle = openvsa.sparsify(Pipe(), density=0.5)
    run(model)
    assert len(handle.report().layers) == 2
    assert "0.5" in str(handle.report())


def test_mistakes_are_named(model: WanTransformer3DModel) -> None:
    with pytest.raises(openvsa.BudgetError, match="either density or budget"):
        openvsa.sparsify(model)
    with pytest.raises(openvsa.BudgetError, match=r"got 2\b"):
        openvsa.sparsify(model, density=2)
    with pytest.raises(openvsa.BudgetError, match=r"got 0\b"):
        openvsa.sparsify(model, density=0)
    with pytest.raises(openvsa.UnsupportedError, match="Linear is of no supported family"):
        openvsa.sparsify(nn.Linear(2, 2), density=0.5)
    with pytest.raises(openvsa.UnsupportedError, match="got object"):
        openvsa.sparsify(object(), density=0.5)
    openvsa.sparsify(model, density=0.5)
    with pytest.raises(openvsa.OpenVSAError, match="attached already"):
        openvsa.sparsify(model, density=0.5)
    with pytest.raises(openvsa.ShapeError, match=r"expected latents of 5 dimensions.*got \[1, 4, 8, 8\]"):
        model(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 3, 16))


def test_a_foreign_processor_is_wrapped_and_given_back(model: WanTransformer3DModel) -> None:
    class Foreign(type(model.blocks[1].attn1.processor)):
        ran = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            Foreign.ran += 1
            return super().__call__(*args, **kwargs)

    foreign = Foreign()
    model.blocks[1].attn1.set_processor(foreign)
    dense = run(model)
    handle = openvsa.sparsify(model, density=0.2)
    assert not torch.equal(run(model), dense)
    assert Foreign.ran == 2
    handle.detach()
    assert model.blocks[1].attn1.processor is foreign


def test_attention_outside_a_forward_is_refused(model: WanTransformer3DModel) -> None:
    openvsa.sparsify(model, density=0.5)
    with pytest.raises(openvsa.OpenVSAError, match="lattice is not known"):
        model.blocks[0].attn1(torch.randn(1, 8, 48), None, None, None)
