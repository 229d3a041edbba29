"""How far apart two clips are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.errors import ShapeError, require
from openvsa.evaluate.video import check_clip

__all__ = ["Quality", "compare_clips", "psnr", "ssim"]

_WINDOW = 11


@dataclass(frozen=True)
class Quality:
    """Likeness of a clip to a reference clip of the same shape.

    psnr: dB, per frame; infinite for an identical frame. ssim: per frame, 1 for an identical frame.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """dB, mean over the frames that differ; infinite when none does.

        Identical frames are left out of both means, because a clip that begins with a given start frame shares it with
        every other, whatever the quality of the rest.
        """
        return _mean([value for value in self.psnr if math.isfinite(value)], math.inf)

    @property
    def mean_ssim(self) -> float:
        """Mean over the frames that differ; 1 when none does."""
        return _mean([s for s, p in zip(self.ssim, self.psnr, strict=True) if math.isfinite(p)], 1.0)


def compare_clips(clip: Tensor, reference: Tensor) -> Quality:
    """PSNR and SSIM of each frame of `clip` against `reference`, both uint8 [frames, height, width, 3].

    Raises:
        ShapeError: the shapes differ, or one is not a clip.
    """
    check_clip(clip)
    check_clip(reference)
    if clip.shape != reference.shape:
        raise ShapeError(f"clips to compare must have one shape, got {list(clip.shape)} and {list(reference.shape)}")
    x, y = (c.movedim(-1, 1).float() / 255 for c in (clip, reference))
    return Quality(tuple(psnr(x, y).tolist()), tuple(ssim(x, y).tolist()))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, -10 log10(mean squared error), for x, y [images, 3, height, width]
    in [0, 1]. Returns [images], infinite for identical images."""
    return -10 * torch.log10((x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per image, by torchmetrics (Gaussian window of 11 pixels, sigma 1.5), for x, y
    [images, 3, height, width] in [0, 1]. Returns [images].

    Raises:
        ShapeError: a side is shorter than the window.
    """
    if min(x.shape[-2:]) < _WINDOW:
        raise ShapeError(f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, got {list(x.shape[-2:])}")
    image = require("torchmetrics.functional.image", extra="video")
    return image.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none").reshape(-1)


def _mean(values: list[float], of_none: float) -> float:
    return sum(values) / len(values) if values else of_none
