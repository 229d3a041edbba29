"""The training objective: rectified flow on what changes in a clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openvsa.models.tokenizer import PatchTokenizer
from openvsa.models.velocity import predict_velocity

__all__ = ["draw_levels", "flow_error"]


def draw_levels(count: int, generator: torch.Generator, *, spread: float, shift: float) -> Tensor:
    """`count` noise levels in (0, 1), fp32 on the CPU: logit-normal, one from each of `count` equal shares, shifted."""
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    level = torch.sigmoid(spread * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)))
    return shift * level / (1 + (shift - 1) * level)


def flow_error(
    model: nn.ModuleDict, tokenizer: PatchTokenizer, clips: Tensor, rows: Tensor, levels: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the predicted velocity, per clip: `[B]`, fp32.

    Args:
        model: holds `transformer` and `shot_tokens`.
        clips: `[B, 3, T, H, W]` in [-1, 1].
        rows: of the table of shot tokens, `[B]`.
        levels: noise levels, `[B]`.
        noise: standard normal, of the shape of the latents.
    """
    still = tokenizer.encode_still(clips[:, :, 0])
    change = tokenizer.encode(clips) - still
    weight = levels.view(-1, 1, 1, 1, 1)
    noisy = (1 - weight) * change + weight * noise
    velocity = predict_velocity(model["transformer"], tokenizer, noisy, levels, still, model["shot_tokens"](rows))
    return (velocity - (noise - change)).square().flatten(1).mean(1)
