"""HunyuanVideo-1.5: video tokens, then image, glyph (ByT5) and text tokens, the valid ones of each sample first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["HunyuanVideo15"]


class HunyuanVideo15(Family):
    """HunyuanVideo15Transformer3DModel.

    The transformer moves the valid conditioning tokens of each sample to the front and masks the rest. The image tokens
    count as valid unless all image embeddings of the batch are zero, which is its sign for text-to-video.
    """

    name = "HunyuanVideo-1.5"
    pair_mask = "attention_mask"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        config = transformer.config
        latents: Tensor = kwargs["hidden_states"]  # [B, C, T, H, W]
        text: Tensor = kwargs["encoder_attention_mask"]  # [B, text], 0 is padding
        glyphs: Tensor = kwargs["encoder_attention_mask_2"]  # [B, glyphs], 0 is padding
        image: Tensor = kwargs["image_embeds"]  # [B, image, D]
        grid = latent_grid(latents, (2, 3, 4), (config.patch_size_t, config.patch_size, config.patch_size))
        valid = text.bool().sum(dim=1) + glyphs.bool().sum(dim=1) + image.shape[1] * torch.any(image != 0)
        conditioning = text.shape[1] + glyphs.shape[1] + image.shape[1]
        return Sequence(grid, suffix=conditioning, text_lengths=tuple(int(n) for n in valid.tolist()))

    def hoist(self, transformer: Any) -> Hoist:
        return Hoist(((transformer.rope, 0, 0), (transformer.x_embedder, 1, 1)), (transformer.proj_out, 1))
