"""Flux.1 and Flux.2: text first, then the image on a two-dimensional lattice, then reference images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence, block_attentions, has_mask

__all__ = ["Flux", "Flux2"]


class Flux(Family):
    """FluxTransformer2DModel: dev, schnell, Fill, Control, Redux and Kontext.

    The latents come packed, so the lattice is read from `img_ids`. Tokens after the image with another first
    coordinate, Kontext's reference image, stay dense. Under a mask of the caller's own, tokens stay in raster order.
    """

    name = "Flux.1"

    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        return block_attentions(transformer, ("transformer_blocks", "single_transformer_blocks"), "attn")

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        text: Tensor = kwargs["encoder_hidden_states"]  # [B, text, D]
        ids: Tensor = kwargs["img_ids"]  # [S, 3 or 4], of one sample
        grid = image_grid(ids[0] if ids.ndim == 3 else ids)
        return Sequence(grid, prefix=text.shape[1], suffix=ids.shape[-2] - grid[0] * grid[1])

    def hoist(self, transformer: Any) -> Hoist:
        # RoPE is computed from the ids, each of its own. The names of the ControlNets' residuals are Flux.1's alone.
        residuals = (("controlnet_block_samples", 1, 3), ("controlnet_single_block_samples", 1, 3))
        arguments = (("hidden_states", 1, 3), ("img_ids", 0, 2), ("img_ids", 1, 3), *residuals)
        return Hoist((), (transformer.proj_out, 1), arguments, around=(False, True))

    def needs_raster_order(self, kwargs: Mapping[str, Any]) -> bool:
        return has_mask(kwargs.get("joint_attention_kwargs"))


class Flux2(Flux):
    """Flux2Transformer2DModel, without the key-value cache of its reference images."""

    name = "Flux.2"

    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        mode = kwargs.get("kv_cache_mode")
        if mode is not None:
            raise UnsupportedError(
                f"Flux.2 with a key-value cache of reference images (kv_cache_mode={mode!r}) cannot be sparse: it "
                "attends in several parts; use Flux2Pipeline instead of its KV form, or detach the handle"
            )
        return super().sequence(transformer, kwargs)


def image_grid(ids: Tensor) -> tuple[int, int]:
    """(H, W) of the first image in position ids [S, (image, row, column, ...)], which is in raster order.

    Only changes between neighbouring ids count, because ids in bfloat16 round rows from 256 on. Ids on a GPU are copied
    to the host, which waits for it.

    Raises:
        UnsupportedError: the ids are no such table, or the image's tokens are no lattice in raster order.
    """
    if ids.ndim != 2 or ids.shape[1] < 3 or not len(ids):
        raise UnsupportedError(f"expected img_ids of shape [tokens, 3 or more], got {list(ids.shape)}")
    image, row, column = ids.detach().cpu().float()[:, :3].unbind(1)
    tokens = _run(image)
    row, column = row[:tokens], column[:tokens]
    width = _run(row)
    raster = not tokens % width
    if raster:
        rows, columns = row.view(-1, width), column.view(-1, width)
        raster = torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
        raster = raster and bool((rows[:, 0].diff() >= 0).all()) and bool((columns[0].diff() >= 0).all())
    if not raster:
        raise UnsupportedError(
            f"the first {tokens} of {len(ids)} img_ids are no lattice in raster order (the first row has {width}); "
            "only an image whose tokens run row by row can be sparse"
        )
    return tokens // width, width


def _run(values: Tensor) -> int:
    """How many entries from the start equal the first one."""
    changes = (values != values[0]).nonzero()
    return int(changes[0]) if len(changes) else len(values)
