"""How far apart two clips are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.errors import ShapeError
from openvsa.evaluate.video import check_clip

__all__ = ["Quality", "compare_clips", "psnr", "ssim"]

_WINDOW, _SIGMA = 11, 1.5


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
    """Structural similarity per image for x, y [images, 3, height, width] in [0, 1]. Returns [images].

    Gaussian window of 11 pixels and sigma 1.5, only where it fits into the image, mean over channels. Source: Wang,
    Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004, eq. 13.

    Raises:
        ShapeError: a side is shorter than the window.
    """
    if min(x.shape[-2:]) < _WINDOW:
        raise ShapeError(f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, got {list(x.shape[-2:])}")
    taps = torch.exp(-(torch.arange(_WINDOW) - _WINDOW // 2).square() / (2 * _SIGMA**2)).to(x)
    taps = taps / taps.sum()

    def blur(image: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(image.flatten(0, 1)[:, None], taps.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, taps.view(1, 1, 1, -1)).unflatten(0, image.shape[:2])

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def _mean(values: list[float], of_none: float) -> float:
    return sum(values) / len(values) if values else of_none
