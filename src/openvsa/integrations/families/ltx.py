"""LTX-Video: one transformer over packed latents, whose lattice comes as sizes or as coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions
from openvsa.integrations.families.coordinates import sequence_of_coordinates

__all__ = ["LTX"]


class LTX(Family):
    """LTXVideoTransformer3DModel: `attn1` of every block is self-attention over the video tokens.

    Latents come packed as [B, S, C]. Text-to-video and image-to-video pass the lattice as num_frames, height and width.
    The condition pipelines pass `video_coords`, which then say where every token is: the lattice is read from them, and
    the tokens of conditioning frames stay dense.
    """

    name = "LTX-Video"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        coords = kwargs.get("video_coords")
        if coords is not None:
            # The pipeline for long videos, which gives sizes of 1, puts conditioning after the video, others before.
            return sequence_of_coordinates(coords, first=kwargs.get("num_frames") == 1)
        sides: dict[str, Any] = {name: kwargs.get(name) for name in ("num_frames", "height", "width")}
        if None in sides.values():
            raise UnsupportedError(
                f"LTX-Video was called with {sides}; pass the latents' num_frames, height and width, or video_coords"
            )
        return Sequence(tuple(int(side) for side in sides.values()))

    def hoist(self, transformer: Any) -> Hoist | None:
        entries = ((transformer.rope, 1, 1), (transformer.proj_in, 1, 1))
        whole = (True, True)
        levels = (("timestep", 1, 2), ("timestep", 1, 3))  # [B, S], or [B, S, 1] in long videos
        return Hoist(entries, (transformer.proj_out, 1), levels, entry_around=whole, around=whole)
