"""What the recorder stores, against attention computed the long way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError
from openvsa.evaluate.recorder import AttentionRecorder, evenly, pack_bits
from openvsa.layout import TileLayout

RAGGED = TileLayout(grid=(3, 5, 7), tile=(2, 2, 4), prefix=9, suffix=3)
MakeEvents = Callable[..., Any]


def one_event(make_events: MakeEvents, layout: TileLayout = RAGGED, **sizes: Any) -> Any:
    return next(iter(make_events(layout, **{"heads": 2, "layers": 1, "steps": 1, "density": 0.3} | sizes)))


def unpack(kept: Tensor, num_blocks: int) -> Tensor:
    bits = kept[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2)[..., :num_blocks].bool()


def coarse_attention(event: Any) -> Tensor:
    """Block by block, in fp64."""
    offsets = event.layout.block_offsets.tolist()
    q, k = (torch.stack([x[0, a:b].double().mean(0) for a, b in pairwise(offsets)], 1) for x in (event.q, event.k))
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    return (torch.einsum("hnd,hmd->hnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)


def test_a_call_is_stored_as_it_was(make_events: MakeEvents) -> None:
    event = one_event(make_events)
    recorder = AttentionRecorder([0])
    recorder(event)
    record = recorder.record()
    call = record.calls[0, 0]
    expected = coarse_attention(event)
    kept = event.plan.block_mask()[0]
    assert torch.equal(unpack(call.kept, RAGGED.num_blocks), kept)
    stored = torch.where(call.probability == 0, 0.0, 2.0 ** ((call.probability.double() / 255 - 1) * 16))
    torch.testing.assert_close(stored, expected, rtol=0.025, atol=2**-16)
    recall = (expected * kept).sum(-1)
    torch.testing.assert_close(call.recall.double() / 255, recall, rtol=0, atol=0.5 / 255 + 1e-6)
    assert record.mean_recall(0) == pytest.approx(recall.mean().item(), abs=1 / 255)
    assert (record.num_heads, record.left_out) == (2, 0)
    assert (record.layers, record.steps) == ({0: "blocks.0.attn1"}, {0: 1000.0})


def test_a_plan_shared_by_heads_and_grouped_keys(make_events: MakeEvents) -> None:
    event = one_event(make_events, heads=4)
    shared = type(event.plan).from_block_mask(event.plan.block_mask()[:, :1], RAGGED.blocks, RAGGED.blocks)
    event = replace(event, plan=shared, k=event.k[:, :, ::2])
    recorder = AttentionRecorder([0])
    recorder(event)
    call = recorder.record().calls[0, 0]
    assert torch.equal(unpack(call.kept, RAGGED.num_blocks), shared.block_mask()[0].expand(4, -1, -1))
    stored = 2.0 ** ((call.probability.double() / 255 - 1) * 16)
    torch.testing.assert_close(stored, coarse_attention(event), rtol=0.025, atol=2**-15)


def test_dense_attention_keeps_every_tile(make_events: MakeEvents) -> None:
    recorder = AttentionRecorder([0])
    recorder(replace(one_event(make_events), plan=None))
    call = recorder.record().calls[0, 0]
    assert unpack(call.kept, RAGGED.num_blocks).all()
    assert (call.recall == 255).all()


def test_steps_are_counted_by_timestep_and_chosen(make_events: MakeEvents) -> None:
    recorder = AttentionRecorder([0, 2])
    for event in make_events(RAGGED, heads=1, layers=2, steps=4, density=0.3):
        recorder(event)
        # Guidance calls the layer again within the step, with other inputs: the first call is the one that stays.
        recorder(replace(event, q=-event.q))
    record = recorder.record()
    assert set(record.calls) == {(0, 0), (0, 1), (2, 0), (2, 1)}
    assert record.steps == {0: 1000.0, 2: 550.0}
    again = AttentionRecorder([0, 2])
    for event in make_events(RAGGED, heads=1, layers=2, steps=4, density=0.3):
        again(event)
    for key, call in again.record().calls.items():
        assert torch.equal(call.probability, record.calls[key].probability)


@pytest.mark.parametrize(("shared", "grouped"), [(False, False), (True, True)], ids=["own", "shared"])
def test_a_large_model_is_recorded_in_part(make_events: MakeEvents, shared: bool, grouped: bool) -> None:
    whole, part = AttentionRecorder([0]), AttentionRecorder([0], layers=[2], max_heads=2)
    for event in make_events(RAGGED, heads=4, layers=3, steps=2, density=0.3):
        plan = event.plan
        if shared:
            plan = type(plan).from_block_mask(plan.block_mask()[:, :1], RAGGED.blocks, RAGGED.blocks)
        event = replace(event, plan=plan, k=event.k[:, :, ::2] if grouped else event.k)
        whole(event)
        part(event)
    record = part.record()
    assert (record.heads, record.num_heads, list(record.calls), record.left_out) == ((0, 2), 2, [(0, 2)], 0)
    for stored in ("kept", "probability", "recall"):
        assert torch.equal(getattr(record.calls[0, 2], stored), getattr(whole.record().calls[0, 2], stored)[[0, 2]]), (
            stored
        )


def test_heads_are_chosen_evenly() -> None:
    assert evenly(40, 4) == (0, 10, 20, 30)
    assert evenly(3, 8) == evenly(3, None) == (0, 1, 2)
    assert evenly(7, 0) == (0,)


def test_the_record_is_bounded_and_says_what_it_left_out(make_events: MakeEvents) -> None:
    events = list(make_events(RAGGED, heads=2, layers=3, steps=2, density=0.3))
    whole = AttentionRecorder([0, 1])
    for event in events:
        whole(event)
    size = whole.record().calls[0, 0].num_bytes
    bounded = AttentionRecorder([0, 1], max_bytes=4 * size)
    for event in events:
        bounded(event)
    assert len(bounded.record().calls) == 4
    assert bounded.record().left_out == 2


def test_a_record_too_small_for_one_call_is_an_error(make_events: MakeEvents) -> None:
    with pytest.raises(OpenVSAError, match="and the record may hold 100; raise max_bytes"):
        AttentionRecorder([0], max_bytes=100)(one_event(make_events))


def test_nothing_seen_is_no_record() -> None:
    assert AttentionRecorder([0]).record() is None


def test_two_lattices_do_not_fit_in_one_record(make_events: MakeEvents) -> None:
    recorder = AttentionRecorder([0])
    recorder(one_event(make_events))
    other = one_event(make_events, TileLayout(grid=(4, 4), tile=(2, 2)))
    with pytest.raises(ShapeError, match=r"one record holds one lattice, got .*\(4, 4\).* after .*\(3, 5, 7\)"):
        recorder(replace(other, layer=1, timestep=1000.0))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_bits_are_packed_from_the_lowest(length: int) -> None:
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (3, -(-length // 8))
    assert torch.equal(unpack(packed, length), mask)
    assert pack_bits(torch.tensor([True, False, False, True])).tolist() == [0b1001]
