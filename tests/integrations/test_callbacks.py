"""What callbacks of a handle may do, and what they may not."""

from __future__ import annotations

import pytest
import torch

import openvsa
from openvsa import SparsityConfig
from openvsa.integrations.report import AttentionEvent
from tiny_wan import run, tiny_wan

SETTINGS = SparsityConfig(density=0.2, tile=(1, 2, 2))


@pytest.mark.parametrize("what", ["detach", "run the model that it watches"])
def test_what_a_callback_must_not_do_is_refused(what: str) -> None:
    """It is called in the middle of a forward, whose tokens are in tile order."""
    model = tiny_wan()
    dense = run(model)
    handle = openvsa.sparsify(model, config=SETTINGS)
    sparse, calls = run(model), []

    def callback(event: AttentionEvent) -> None:
        calls.append(event)
        if len(calls) == 1:
            handle.detach() if what == "detach" else run(model)

    handle.on_attention(callback)
    with pytest.raises(openvsa.OpenVSAError, match=f"an on_attention callback cannot {what}: .* after the forward"):
        run(model)
    assert torch.equal(run(model), sparse)
    handle.detach()
    assert torch.equal(run(model), dense)


def test_settings_that_a_callback_sets_hold_from_the_next_forward_on() -> None:
    model, other = tiny_wan(), SparsityConfig(density=0.5, tile=(3, 1, 1))
    with openvsa.sparsify(model, config=SETTINGS):
        sparse = run(model)
    with openvsa.sparsify(model, config=other):
        expected = run(model)
    handle = openvsa.sparsify(model, config=SETTINGS)
    handle.on_attention(lambda event: setattr(handle, "config", other))
    assert torch.equal(run(model), sparse)
    assert torch.equal(run(model), expected)
