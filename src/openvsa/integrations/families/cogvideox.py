"""CogVideoX 1.0 and 1.5: text first, all of it attended, then the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, has_mask, latent_grid

__all__ = ["CogVideoX"]


class CogVideoX(Family):
    """CogVideoXTransformer3DModel, text-to-video, image-to-video and the Fun variants.

    Its latents are [B, T, C, H, W]. Version 1.5 also joins `patch_size_t` frames in a token, which 1.0 leaves at None.
    """

    name = "CogVideoX"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        config = transformer.config
        latents: Tensor = kwargs["hidden_states"]  # [B, T, C, H, W]
        text: Tensor = kwargs["encoder_hidden_states"]  # [B, text, D]
        grid = latent_grid(latents, (1, 3, 4), (config.patch_size_t or 1, config.patch_size, config.patch_size))
        return Sequence(grid, prefix=text.shape[1])

    def hoist(self, transformer: Any) -> Hoist:
        # The embedding has text and video in one output; RoPE, cosines and sines [S, D], and the exit are the video's.
        entries, rope = ((transformer.patch_embed, 1, 1),), ("image_rotary_emb", 0, 2)
        return Hoist(entries, (transformer.proj_out, 1), (rope,), entry_around=(True, False))

    def needs_raster_order(self, kwargs: Mapping[str, Any]) -> bool:
        return has_mask(kwargs.get("attention_kwargs"))
