"""What the transformer is asked for: the flow's velocity, less what its linear estimate already knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvsa.models.tokenizer import PatchTokenizer

__all__ = ["predict_velocity"]


def predict_velocity(
    transformer: Any, tokenizer: PatchTokenizer, noisy: Tensor, sigma: Tensor, still: Tensor, shot_tokens: Tensor
) -> Tensor:
    """The velocity `noise - change` at `noisy = (1 - sigma) * change + sigma * noise`.

    `change` is what is generated: a clip's latents less those of its start frame held still, so that whatever does
    not move is right before the model has learned anything. The latents are nearly uncorrelated and their spread is
    known, so the best linear estimate of the velocity is known too. The transformer predicts the rest, in units of
    its expected size: the preconditioning of Karras et al. 2022 (arXiv:2206.00364, section 5) carried over to
    rectified flow, with a data spread per latent channel and time cell.

    Args:
        transformer: a Diffusers Wan transformer with 2 C input and C output channels.
        noisy: `[B, C, T, H, W]`, fp32.
        sigma: `[B]`, in [0, 1].
        still: latents of the start frame, `[B, C, 1, H, W]`.
        shot_tokens: `[B, L, dim]`.

    Returns fp32 `[B, C, T, H, W]`.
    """
    level = sigma.view(-1, 1, 1, 1, 1)
    spread = tokenizer.change_std[None, :, :, None, None] ** 2
    variance = (1 - level) ** 2 * spread + level**2
    linear = (level - (1 - level) * spread) / variance * noisy
    still = (still / tokenizer.still_std.view(-1, 1, 1, 1)).expand_as(noisy)
    rest = transformer(
        hidden_states=torch.cat([noisy * variance.rsqrt(), still], dim=1).to(transformer.dtype),
        timestep=sigma * 1000,
        encoder_hidden_states=shot_tokens.to(transformer.dtype),
        return_dict=False,
    )[0]
    return linear + (spread / variance).sqrt() * rest.float()
