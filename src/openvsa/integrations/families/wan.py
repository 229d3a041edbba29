"""Wan 2.1 and 2.2: text to video, image to video, VACE, Animate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, latent_grid

__all__ = ["Wan"]


class Wan(Family):
    """`attn1` of every block is self-attention over the video alone; text and images come through cross-attention.

    VACE has blocks of its own over the control video, which run before the others on a lattice of the same size.
    """

    name = "Wan"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        stacks = tuple(stack for stack in ("vace_blocks", "blocks") if hasattr(transformer, stack))
        return block_attentions(transformer, stacks, "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        return Sequence(latent_grid(kwargs["hidden_states"], (2, 3, 4), transformer.config.patch_size))

    def hoist(self, transformer: Any) -> Hoist | None:
        if hasattr(transformer, "face_adapter"):  # Animate's adapters between the blocks go frame by frame
            return None
        entries = [(transformer.rope, 1, 1), (transformer.patch_embedding, 2, 4)]
        if hasattr(transformer, "vace_patch_embedding"):
            entries.append((transformer.vace_patch_embedding, 2, 4))
        # Wan 2.2 may give every token a noise level of its own: a timestep [B, S].
        return Hoist(tuple(entries), (transformer.proj_out, 1), (("timestep", 1, 2),))
