"""Kandinsky 5: a lattice of visual tokens, text through cross-attention; NABLA checkpoints bring their own sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["Kandinsky5"]


class Kandinsky5(Family):
    """Kandinsky5Transformer3DModel: `self_attention` of every visual block is self-attention over the visual tokens.

    Text blocks and cross-attention stay as they are. Latents come with the channels last, [B, T, H, W, C].
    """

    name = "Kandinsky 5"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("visual_transformer_blocks",), "self_attention")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        if kwargs.get("sparse_params") is not None:
            raise UnsupportedError(
                "this Kandinsky 5 model was called with sparse_params: it has block-sparse attention of its own "
                "(NABLA), with its tokens in another order. Load its transformer with attention_type='regular' to use "
                "OpenVSA instead, or leave it as it is"
            )
        return Sequence(latent_grid(kwargs["hidden_states"], (1, 2, 3), transformer.config.patch_size))

    def heads(self, transformer: Any) -> tuple[int, int]:
        head_dim = sum(transformer.config.axes_dims)
        return transformer.config.model_dim // head_dim, head_dim

    def hoist(self, transformer: Any) -> Hoist | None:
        entries = ((transformer.visual_embeddings, 1, 3), (transformer.visual_rope_embeddings, 1, 3))
        return Hoist(entries, (transformer.visual_transformer_blocks[-1], 1))
