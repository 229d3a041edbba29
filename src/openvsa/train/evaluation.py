"""The loss on clips, noise and noise levels that stay the same throughout a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from openvsa.models.shots import UNKNOWN_SHOT
from openvsa.models.tokenizer import PatchTokenizer
from openvsa.train.clips import Clips
from openvsa.train.flow import flow_error
from openvsa.train.recipe import TrainConfig

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    config: TrainConfig, model: nn.ModuleDict, handle: Any, tokenizer: PatchTokenizer, clips: Clips
) -> dict[str, dict[str, float]]:
    """Mean loss, by set of clips and density: {"training": {"0.25": ...}, "held_out": {...}}.

    `handle` sets the density of the model's attention. Held-out clips are shown without a shot, training clips with
    theirs.
    """
    losses: dict[str, dict[str, float]] = {}
    for name, starts in (("training", clips.training), ("held_out", clips.held_out)):
        chosen = [starts[i * len(starts) // config.evaluation_clips] for i in range(config.evaluation_clips)]
        batch = clips.load(chosen)
        shape = tokenizer.latent_shape(batch.shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(batch.device)
        rows = torch.tensor(clips.rows(chosen) if name == "training" else [UNKNOWN_SHOT] * len(chosen)).to(batch.device)
        losses[name] = {}
        for density in config.evaluation_densities:
            handle.density = density
            errors = []
            for level in config.evaluation_levels:
                levels = torch.full((len(chosen),), level).to(batch.device)
                errors.append(flow_error(model, tokenizer, batch, rows, levels, noise).mean())
            losses[name][str(density)] = torch.stack(errors).mean().item()
    return losses
