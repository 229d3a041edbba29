"""Tiles of queries that choose together, in models."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import openvsa
from openvsa import SparsityConfig
from openvsa.evaluate.recorder import AttentionRecorder
from openvsa.integrations.branch import add_branch
from openvsa.integrations.report import AttentionEvent
from tiny_wan import run, tiny_wan

GRID = (3, 5, 7)


def settings(density: float, **changes: object) -> SparsityConfig:
    return SparsityConfig(density=density, tile=(1, 2, 2), q_tiles=(1, 1, 2), min_tokens=0, **changes)  # pyright: ignore


@pytest.mark.parametrize("tile", [(1, 2, 2), None])
def test_all_tiles_are_as_dense(tile: tuple[int, ...] | None) -> None:
    model = tiny_wan()
    dense = run(model)
    with openvsa.sparsify(model, config=SparsityConfig(density=1.0, tile=tile, q_tiles=(1, 1, 2), min_tokens=0)):
        torch.testing.assert_close(run(model), dense)
    assert torch.equal(run(model), dense)


def test_two_tiles_have_one_list() -> None:
    model = tiny_wan()
    events: list[AttentionEvent] = []
    with openvsa.sparsify(model, config=settings(0.3)) as handle:
        handle.on_attention(events.append)
        recorder = AttentionRecorder([0], max_heads=2, max_bytes=1 << 20)
        handle.on_attention(recorder)
        together = run(model)
    plan, layout = events[0].plan, events[0].layout
    assert plan is not None
    assert layout.tile_grid == (3, 3, 4)
    assert plan.q_blocks.num_blocks == 3 * 3 * 2
    assert plan.kv_blocks.num_blocks == 3 * 3 * 4
    assert (plan.kv_num_blocks == 11).all()  # ceil(.3 * 36)
    with openvsa.sparsify(model, config=SparsityConfig(density=0.3, tile=(1, 2, 2), min_tokens=0)):
        assert not torch.equal(run(model), together)
    record = recorder.record()
    assert record is not None
    assert record.layout.num_blocks == 36


def test_text_before_the_lattice() -> None:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=1, sample_width=14, sample_height=10, sample_frames=9, patch_size=2, max_text_seq_length=5,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 10, 14), "encoder_hidden_states": torch.randn(1, 5, 8),
        "timestep": torch.tensor([5]),
    }  # fmt: skip

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    dense = forward()
    with openvsa.sparsify(model, config=settings(1.0)):
        torch.testing.assert_close(forward(), dense)
    events: list[AttentionEvent] = []
    with openvsa.sparsify(model, config=settings(0.3)) as handle:
        handle.on_attention(events.append)
        assert (forward() - dense).norm() > 0.001 * dense.norm()
    plan, layout = events[0].plan, events[0].layout
    assert plan is not None
    text = layout.tile_blocks.start
    assert plan.block_mask()[..., :text].all()  # everyone reads the text, and text reads everything
    assert plan.block_mask()[:, :, : layout.q_tile_blocks.start].all()


def test_not_with_branch_weights() -> None:
    model = tiny_wan()
    add_branch(model)
    with pytest.raises(openvsa.UnsupportedError, match=r"leave out q_tiles, got \(1, 1, 2\)"):
        openvsa.sparsify(model, config=settings(0.5))
