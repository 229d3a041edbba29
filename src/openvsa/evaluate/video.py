"""Clips on disk: H.264 mp4 files that every browser plays, and two clips joined into one with labels.

A clip is a uint8 RGB tensor [frames, height, width, 3] on the CPU.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError, require
from openvsa.evaluate.files import atomic_path

__all__ = ["check_clip", "read_video", "side_by_side", "write_video"]

_SHAREABLE_WIDTH = 480
_CONSTANT_QUALITY = "15"


def check_clip(clip: Tensor) -> None:
    """Raises ShapeError unless `clip` is a uint8 tensor [frames >= 1, height, width, 3]."""
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or clip.numel() == 0:
        raise ShapeError(f"a clip is a uint8 tensor [frames, height, width, 3], got {clip.dtype} {list(clip.shape)}")


def write_video(clip: Tensor, path: str | Path, *, fps: float) -> None:
    """Writes `clip`, uint8 [frames, height, width, 3], as H.264 yuv420p, whole or not at all.

    Raises:
        ShapeError: it is no clip, or its height or width is odd, which yuv420p cannot hold.
    """
    check_clip(clip)
    if clip.shape[1] % 2 or clip.shape[2] % 2:
        raise ShapeError(f"H.264 yuv420p needs an even height and width, got {list(clip.shape[1:3])}")
    av = require("av", extra="video")
    with atomic_path(path) as temporary:
        # The index goes to the front so that a browser can start before it has the whole file.
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
            # Without macroblock trees, because with them the same clip gives other bytes from run to run.
            stream.options = {"crf": _CONSTANT_QUALITY, "x264-params": "mbtree=0"}
            for image in clip.cpu().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


def read_video(path: str | Path) -> Tensor:
    """All frames of the first video stream, as a uint8 RGB tensor [frames, height, width, 3].

    Raises:
        OpenVSAError: the file is not a video that can be decoded.
    """
    av = require("av", extra="video")
    try:
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise OpenVSAError(f"cannot read a video from {str(path)!r}: {error}") from None
    return torch.stack(frames)


def side_by_side(left: Tensor, right: Tensor, labels: tuple[str, str]) -> Tensor:
    """Two clips of one shape beside each other, each below its label, enlarged to a width fit for sharing.

    Returns uint8 [frames, height', width', 3] with even height' and width'.

    Raises:
        ShapeError: the clips have two shapes.
    """
    check_clip(left)
    if left.shape != right.shape:
        raise ShapeError(f"clips to join must have one shape, got {list(left.shape)} and {list(right.shape)}")
    require("PIL", extra="video")
    from PIL import Image, ImageDraw, ImageFont

    height, width = left.shape[1:3]
    zoom = max(1, -(-_SHAREABLE_WIDTH // width))
    height, width = height * zoom, width * zoom
    gap, bar, font_size = max(2, width // 60), max(16, width // 16), max(10, width // 30)
    canvas = Image.new("RGB", ((2 * width + gap + 1) // 2 * 2, (height + bar + 1) // 2 * 2), "#111418")
    draw = ImageDraw.Draw(canvas)
    for x, label in zip((0, width + gap), labels, strict=True):
        draw.text((x + width / 2, bar / 2), label, "#e8e6e1", ImageFont.load_default(font_size), anchor="mm")
    joined = []
    for pair in zip(left.cpu().numpy(), right.cpu().numpy(), strict=True):
        for x, image in zip((0, width + gap), pair, strict=True):
            canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (x, bar))
        pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
        joined.append(pixels.view(canvas.height, canvas.width, 3))
    return torch.stack(joined)
