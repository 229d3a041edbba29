"""Mochi: video tokens, then each sample's valid text, one attention call for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["Mochi"]


class Mochi(Family):
    """MochiTransformer3DModel.

    Its processor takes the padding out of the text and attends sample by sample. A sample may have no valid text at
    all: the pipeline encodes an empty negative prompt so. Timesteps rise from 0 (noise) to 1000 (video), unlike
    everyone else's.
    """

    name = "Mochi"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        config = transformer.config
        latents: Tensor = kwargs["hidden_states"]  # [B, C, T, H, W]
        mask: Tensor = kwargs["encoder_attention_mask"]  # [B, text], 0 is padding
        grid = latent_grid(latents, (2, 3, 4), (1, config.patch_size, config.patch_size))
        lengths = tuple(int(n) for n in mask.bool().sum(dim=1).tolist())
        return Sequence(grid, suffix=mask.shape[1], text_lengths=lengths, per_sample=True)

    def hoist(self, transformer: Any) -> Hoist:
        entries = ((transformer.rope, 0, 0), (transformer.patch_embed, 0, 1))  # frames are embedded as samples are
        return Hoist(entries, (transformer.proj_out, 1))

    def timestep(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        rising = super().timestep(kwargs)
        return None if rising is None else 1000 - rising.float()  # bfloat16 could not tell 999 from 1000
