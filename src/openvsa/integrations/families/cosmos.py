"""Cosmos 1, Predict2, Predict2.5 and Transfer2.5: one lattice of video tokens, text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["Cosmos"]


class Cosmos(Family):
    """CosmosTransformer3DModel: `attn1` of every block is self-attention over the video tokens.

    Frames that condition a video (video-to-world) are frames of the same lattice, and are treated like the others.
    Their timesteps, one for each frame, modulate tokens in raster order, so every layer then permutes for itself.
    """

    name = "Cosmos"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        return Sequence(latent_grid(kwargs["hidden_states"], (2, 3, 4), transformer.config.patch_size))

    def hoist(self, transformer: Any) -> Hoist:
        entries = [(transformer.rope, 0, 0), (transformer.patch_embed, 1, 3)]
        if transformer.learnable_pos_embed is not None:
            entries.append((transformer.learnable_pos_embed, 1, 1))
        residuals = ("block_controlnet_hidden_states", 1, 3)
        return Hoist(tuple(entries), (transformer.proj_out, 1), (residuals,))

    def needs_raster_order(self, kwargs: Mapping[str, Any]) -> bool:
        return kwargs["timestep"].ndim > 1  # the blocks modulate every frame apart
