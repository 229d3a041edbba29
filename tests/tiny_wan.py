"""A tiny random Wan transformer, and forwards of it."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn


def tiny_wan(layers: int = 2) -> WanTransformer3DModel:
    """Two heads of 24 channels, patches of 1 x 2 x 2, 4 latent channels; always the same weights."""
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
        num_layers=layers,
    ).eval()


def text(batch: int = 1, seed: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module, level: float = 500.0, prompt: Tensor | None = None, grid: tuple[int, int, int] = (3, 5, 7)
) -> Tensor:
    """The output at a noise level; latents have a lattice of `grid` tokens and depend on the level."""
    prompt = text() if prompt is None else prompt
    t, h, w = grid
    latents = torch.randn(len(prompt), 4, t, 2 * h, 2 * w, generator=torch.Generator().manual_seed(int(level)))
    with torch.no_grad():
        return model(latents, torch.full((len(prompt),), level), prompt)[0]
