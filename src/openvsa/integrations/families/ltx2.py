"""LTX-2: video and audio in one transformer; only the video's self-attention becomes sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence

__all__ = ["LTX2"]


class LTX2(Family):
    """LTX2VideoTransformer3DModel: `attn1` of every block is self-attention over the video tokens.

    The audio's self-attention, both directions between video and audio, and text stay as they are. The video's own
    tokens come first, num_frames x height x width; pipelines append those of keyframes and reference videos.
    """

    name = "LTX-2"
    transformers = ("LTX2VideoTransformer3DModel",)

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return [
            (f"transformer_blocks.{index}.attn1", block.attn1)
            for index, block in enumerate(transformer.transformer_blocks)
        ]

    def sequence(self, transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence:
        sides: dict[str, Any] = {name: kwargs.get(name) for name in ("num_frames", "height", "width")}
        if None in sides.values():
            raise UnsupportedError(
                f"LTX-2 was called with {sides}, but the lattice is needed to tell the video from appended keyframes. "
                "Call the transformer with num_frames, height and width; pipelines that pass coordinates alone (DFR) "
                "are not supported",
                {},
            )
        config = transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        grid = tuple(-(-int(side) // size) for side, size in zip(sides.values(), patch, strict=True))
        tokens = kwargs["hidden_states"].shape[1]
        if tokens < math.prod(grid):
            raise UnsupportedError(
                f"LTX-2 was called with {tokens} video tokens, but the lattice {grid} has {math.prod(grid)}; pass the "
                "latents' num_frames, height and width",
                {},
            )
        return Sequence(grid, suffix=tokens - math.prod(grid))

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        # One for each token where some are conditioning, which is further denoised than the video.
        return kwargs["timestep"].amax()

    def variant(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        # Without its sound, or with blocks that do not attend, the same prompt is another branch.
        return bool(kwargs.get("isolate_modalities")), tuple(kwargs.get("spatio_temporal_guidance_blocks") or ())

    def hoist(self, transformer: Any) -> Hoist | None:
        if transformer.config.use_keyframes_abs_pos_embedding:  # a mask [B, S, 1] goes in beside the tokens
            return None
        tokens = 2 if transformer.config.rope_type == "split" else 1  # [B, H, S, D] or [B, S, D]
        ropes = tuple((rope, tokens, tokens) for rope in (transformer.rope, transformer.cross_attn_rope))
        entries, whole = (*ropes, (transformer.proj_in, 1, 1)), (True, True)
        return Hoist(entries, (transformer.proj_out, 1), (("timestep", 1, 2),), entry_around=whole, around=whole)

    def without_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Spatio-temporal guidance replaces the attention of chosen blocks by their values."""
        perturbed = kwargs.get("all_perturbed")
        return perturbed is not None and bool(perturbed)
