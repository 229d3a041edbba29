"""CogVideoX 1.0 and 1.5: text first, all of it attended, then the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openvsa.integrations.families.base import Family, Sequence, argument
from openvsa.integrations.families.joint import block_attentions, latent_grid

__all__ = ["CogVideoX"]


class CogVideoX(Family):
    """CogVideoXTransformer3DModel, text-to-video, image-to-video and the Fun variants.

    Its latents are [B, T, C, H, W]. Version 1.5 also joins `patch_size_t` frames in a token, which 1.0 leaves at None.
    """

    name = "CogVideoX"
    transformers = ("CogVideoXTransformer3DModel",)

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence:
        config = transformer.config
        latents: Tensor = argument(transformer, "hidden_states", args, kwargs)  # [B, T, C, H, W]
        text: Tensor = argument(transformer, "encoder_hidden_states", args, kwargs)  # [B, text, D]
        grid = latent_grid(latents, (1, 3, 4), (config.patch_size_t or 1, config.patch_size, config.patch_size))
        return Sequence(grid, prefix=text.shape[1])
