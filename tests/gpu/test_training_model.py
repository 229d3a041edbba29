"""A sparsified Wan transformer under gradients on a GPU, where autograd runs backward passes in a thread of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import openvsa
from openvsa import SparsityConfig
from tiny_wan import text, tiny_wan

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LATENTS = torch.randn(1, 4, 4, 18, 20, generator=torch.Generator().manual_seed(1))
SETTINGS = SparsityConfig(density=0.3, tile=(2, 4, 4), min_tokens=0)


def trained() -> Any:
    return tiny_wan().to(DEVICE).train()


def forward(model: Any, level: float = 300.0) -> Tensor:
    return model(LATENTS.to(DEVICE), torch.tensor([level], device=DEVICE), text().to(DEVICE))[0]


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    forward(model).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = trained()
        openvsa.sparsify(model, config=SETTINGS)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(gradients(model))
    assert len(found[0]) == len(found[1]) > 20
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_two_forwards_and_one_backward_pass() -> None:
    model = trained()
    openvsa.sparsify(model, config=SETTINGS)
    model.enable_gradient_checkpointing()
    weight = model.blocks[0].attn1.to_k.weight

    def gradient(*levels: float) -> Tensor:
        torch.stack([forward(model, level).square().mean() for level in levels]).sum().backward()
        assert weight.grad is not None
        found, weight.grad = weight.grad, None
        return found

    torch.testing.assert_close(gradient(900.0, 300.0), gradient(900.0) + gradient(300.0))


def test_a_copy_of_what_has_run_gives_the_same() -> None:
    """Times of attention are measured by events of the GPU, which cannot be copied."""
    model = trained()
    handle = openvsa.sparsify(model, config=SETTINGS)
    expected = gradients(model)
    twin, hold = copy.deepcopy((model, handle))
    for got in (gradients(twin), gradients(model)):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert [layer.calls for layer in hold.report().layers] == [1, 1]
    assert [layer.calls for layer in handle.report().layers] == [2, 2]
    hold.detach()
    handle.detach()
    assert torch.equal(forward(twin), forward(model))
