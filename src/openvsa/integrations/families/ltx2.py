"""LTX-2: video and audio in one transformer; only the video's self-attention becomes sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions
from openvsa.layout.keep import fakes_are_on

__all__ = ["LTX2"]


class LTX2(Family):
    """LTX2VideoTransformer3DModel: `attn1` of every block is self-attention over the video tokens.

    The audio's self-attention, both directions between video and audio, and text stay as they are. The video's own
    tokens are num_frames x height x width. Pipelines append those of keyframes and reference videos; Echo's puts those
    of its memory first, which the coordinates tell.
    """

    name = "LTX-2"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks",), "attn1")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        sides: dict[str, Any] = {name: kwargs.get(name) for name in ("num_frames", "height", "width")}
        if None in sides.values():
            raise UnsupportedError(
                f"LTX-2 was called with {sides}, but the lattice is needed to tell the video from appended keyframes. "
                "Call the transformer with num_frames, height and width; pipelines that pass coordinates alone (DFR) "
                "are not supported"
            )
        config = transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        grid = tuple(-(-int(side) // size) for side, size in zip(sides.values(), patch, strict=True))
        tokens = kwargs["hidden_states"].shape[1]
        if tokens < math.prod(grid):
            raise UnsupportedError(
                f"LTX-2 was called with {tokens} video tokens, but the lattice {grid} has {math.prod(grid)}; pass the "
                "latents' num_frames, height and width"
            )
        others, coords = tokens - math.prod(grid), kwargs.get("video_coords")
        # Nothing is read from coordinates inside torch.compile, or from those without values: tokens are taken for
        # appended, as in LTX-2's pipelines.
        before, unread = 0, torch.compiler.is_compiling() or fakes_are_on()
        if others and coords is not None and not (unread or coords.is_meta):
            before = _tokens_before(coords, transformer.rope.prepare_video_coords(1, *sides.values(), "cpu"))
        return Sequence(grid, prefix=before, suffix=others - before)

    def variant(self, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        # Without its sound, or with blocks that do not attend, the same prompt is another branch.
        return bool(kwargs.get("isolate_modalities")), tuple(kwargs.get("spatio_temporal_guidance_blocks") or ())

    def hoist(self, transformer: Any) -> Hoist | None:
        if transformer.config.use_keyframes_abs_pos_embedding:  # a mask [B, S, 1] goes in beside the tokens
            return None
        tokens = 2 if transformer.config.rope_type == "split" else 1  # [B, H, S, D] or [B, S, D]
        ropes = tuple((rope, tokens, tokens) for rope in (transformer.rope, transformer.cross_attn_rope))
        entries, whole = (*ropes, (transformer.proj_in, 1, 1)), (True, True)
        levels = (("timestep", 1, 2), ("timestep", 1, 3))  # [B, S] or [B, S, 1]
        return Hoist(entries, (transformer.proj_out, 1), levels, entry_around=whole, around=whole)

    def without_attention(self, kwargs: Mapping[str, Any]) -> bool:
        """Spatio-temporal guidance replaces the attention of chosen blocks by their values."""
        perturbed = kwargs.get("all_perturbed")
        return perturbed is not None and bool(perturbed)


def _tokens_before(coords: Tensor, video: Tensor) -> int:
    """How many tokens are before the video's in coordinates [B, 3, S, 2] of all of them: none, or all that are not the
    video's. `video` are those of the video, [1, 3, S', 2], at any frame rate. Coordinates on a GPU are copied to the
    host, which waits for it.

    Raises:
        UnsupportedError: the video is at neither end.
    """
    coords = coords[:1].detach().cpu().float()
    tokens, others = video.shape[2], coords.shape[2] - video.shape[2]
    for before in (0, others):
        here = coords[:, :, before : before + tokens]
        rate = here[0, 0, 0, 1] / video[0, 0, 0, 1]  # the end of the first frame
        expected = torch.cat([video[:, :1] * rate, video[:, 1:]], 1)
        if torch.allclose(here, expected, rtol=1e-2):
            return before
    raise UnsupportedError(
        f"LTX-2 was called with {others} tokens beside the {tokens} of its lattice, and video_coords has the lattice "
        "neither before nor after them; pass coordinates as transformer.rope.prepare_video_coords makes them for the "
        "video, with those of other tokens before or after"
    )
