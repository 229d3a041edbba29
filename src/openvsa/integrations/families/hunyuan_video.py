"""HunyuanVideo: video tokens, then padded text, in two-stream and after them one-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["HunyuanVideo"]


class HunyuanVideo(Family):
    """HunyuanVideoTransformer3DModel, text-to-video and both kinds of image-to-video.

    The transformer masks keys past a sample's first `encoder_attention_mask.sum()` text tokens. The attention of its
    text refiner stays dense.
    """

    name = "HunyuanVideo"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks", "single_transformer_blocks"), "attn")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        config = transformer.config
        latents: Tensor = kwargs["hidden_states"]  # [B, C, T, H, W]
        mask: Tensor = kwargs["encoder_attention_mask"]  # [B, text], 0 is padding
        grid = latent_grid(latents, (2, 3, 4), (config.patch_size_t, config.patch_size, config.patch_size))
        lengths = tuple(int(n) for n in mask.sum(dim=1).tolist())
        # The transformer lets one prompt serve a batch: so do pipelines, given its embedding and num_videos_per_prompt.
        lengths = lengths * len(latents) if len(lengths) == 1 else lengths
        return Sequence(grid, suffix=mask.shape[1], text_lengths=lengths)

    def hoist(self, transformer: Any) -> Hoist | None:
        if transformer.config.image_condition_type == "token_replace":  # its blocks modulate the first frame apart
            return None
        return Hoist(((transformer.rope, 0, 0), (transformer.x_embedder, 1, 1)), (transformer.proj_out, 1))
