"""The data behind the page's interactive picture of where attention looked."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from typing import Any

from torch import Tensor

from openvsa.errors import require
from openvsa.evaluate.recorder import PROBABILITY_BITS, AttentionRecord
from openvsa.layout import TileLayout

__all__ = ["data_url", "panels", "picture_data"]

_BACKDROP_WIDTH = 360
_BACKDROP_QUALITY = 78


def picture_data(record: AttentionRecord, clip: Tensor) -> dict[str, Any]:
    """What the page needs to draw a record over the frames of `clip` (uint8 [frames, height, width, 3]), as JSON types.

    `panels` are the drawings in block order; `calls` hold the bytes of each recorded call as base64.
    """
    return {
        "panels": panels(record.layout, clip),
        "width": clip.shape[2],
        "height": clip.shape[1],
        "numBlocks": record.layout.num_blocks,
        "heads": list(record.heads),
        "probabilityBits": PROBABILITY_BITS,
        "steps": [{"step": step, "timestep": timestep} for step, timestep in record.steps.items()],
        "layers": [{"layer": layer, "name": name} for layer, name in record.layers.items()],
        "calls": [
            {
                "step": step,
                "layer": layer,
                "kept": _base64(call.kept),
                "probability": _base64(call.probability),
                "recall": _base64(call.recall),
            }
            for (step, layer), call in record.calls.items()
        ],
        "leftOut": record.left_out,
    }


def panels(layout: TileLayout, clip: Tensor) -> list[dict[str, Any]]:
    """One panel per row of tiles along time, over its middle frame, and one per run of text blocks.

    A panel holds rows x cols consecutive blocks from `first`; `xs` and `ys` are their edges as shares of the panel.
    """
    tiles = layout.tile_blocks
    drawn = [_text_panel("text before the video", 0, tiles.start)]
    grid, tile = ((1,) * (3 - len(sides)) + sides for sides in (layout.grid, layout.tile))
    rows, cols = (_edges(g, t) for g, t in zip(grid[1:], tile[1:], strict=True))
    tiles_per_slab = (len(rows) - 1) * (len(cols) - 1)
    edges = _edges(grid[0], tile[0])
    for index, (begin, end) in enumerate(pairwise(edges)):
        first = int(begin * len(clip))
        last = min(max(first, round(end * len(clip)) - 1), len(clip) - 1)
        drawn.append(
            {
                "kind": "frames",
                "label": f"frames {first + 1} to {last + 1}" if last > first else f"frame {first + 1}",
                "image": data_url(_jpeg(clip[(first + last) // 2]), "image/jpeg"),
                "first": tiles.start + index * tiles_per_slab,
                "xs": cols,
                "ys": rows,
            }
        )
    drawn.append(_text_panel("text after the video", tiles.stop, layout.num_blocks))
    return [panel for panel in drawn if len(panel["xs"]) > 1]


def data_url(content: bytes, kind: str) -> str:
    """A file as a URL that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text_panel(label: str, first: int, stop: int) -> dict[str, Any]:
    return {"kind": "text", "label": label, "first": first, "xs": _edges(stop - first, 1), "ys": [0.0, 1.0]}


def _edges(length: int, tile: int) -> list[float]:
    """Where the tiles of an axis begin and end, as shares of it: the last one may be short."""
    return [position / length for position in range(0, length, tile)] + [1.0]


def _jpeg(frame: Tensor) -> bytes:
    require("PIL", extra="video")
    from PIL import Image

    image = Image.fromarray(frame.cpu().numpy())
    image.thumbnail((_BACKDROP_WIDTH, _BACKDROP_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_BACKDROP_QUALITY)
    return file.getvalue()


def _base64(content: Tensor) -> str:
    return base64.b64encode(content.cpu().numpy().tobytes()).decode()
