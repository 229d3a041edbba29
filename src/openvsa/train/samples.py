"""A picture of what a model makes of the named scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openvsa.errors import require

__all__ = ["write_sheet"]

_COLUMNS = 8


def write_sheet(clips: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Writes a PNG with a row of a few frames for each labelled clip (uint8 `[frames, height, width, 3]`)."""
    require("PIL", extra="train")
    from PIL import Image, ImageDraw

    height, width = clips[0][1].shape[1:3]
    height, width, bar = height * 3 // 4, width * 3 // 4, 14
    sheet = Image.new("RGB", (_COLUMNS * width, len(clips) * (height + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, clip) in enumerate(clips):
        draw.text((2, row * (height + bar)), label, "black")
        shown = torch.linspace(0, len(clip) - 1, _COLUMNS).round().long()
        for column, frame in enumerate(clip[shown].numpy()):
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (column * width, row * (height + bar) + bar))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
