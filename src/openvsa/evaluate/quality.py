"""How far apart two clips are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.errors import ShapeError, require
from openvsa.evaluate.video import check_clip

__all__ = ["Quality", "compare_clips", "psnr", "ssim", "vif"]

_WINDOW = 11
_SMALLEST_FOR_VIF = 41  # four scales of a window of 17 pixels


@dataclass(frozen=True)
class Quality:
    """Likeness of a clip to a reference clip of the same shape.

    psnr: dB, per frame; infinite for an identical frame. ssim: per frame, 1 for an identical frame. vif: the same, or
    empty where it was not measured (frames of fewer than 41 pixels).
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    vif: tuple[float, ...] = ()

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
        return self._mean_of_changed(self.ssim)

    @property
    def mean_vif(self) -> float | None:
        """Mean over the frames that differ; 1 when none does; None where it was not measured."""
        return self._mean_of_changed(self.vif) if self.vif else None

    def __str__(self) -> str:
        vif = "" if self.mean_vif is None else f", VIF {self.mean_vif:.3f}"
        return f"PSNR {self.mean_psnr:.1f} dB, SSIM {self.mean_ssim:.3f}{vif}"

    def _mean_of_changed(self, values: tuple[float, ...]) -> float:
        return _mean([x for x, p in zip(values, self.psnr, strict=True) if math.isfinite(p)], 1.0)


def compare_clips(clip: Tensor, reference: Tensor) -> Quality:
    """PSNR, SSIM and VIF of each frame of `clip` against `reference`, both uint8 [frames, height, width, 3].

    Raises:
        ShapeError: the shapes differ, or one is not a clip.
    """
    check_clip(clip)
    check_clip(reference)
    if clip.shape != reference.shape:
        raise ShapeError(f"clips to compare must have one shape, got {list(clip.shape)} and {list(reference.shape)}")
    x, y = (c.movedim(-1, 1).float() / 255 for c in (clip, reference))
    large = min(x.shape[-2:]) >= _SMALLEST_FOR_VIF
    return Quality(tuple(psnr(x, y).tolist()), tuple(ssim(x, y).tolist()), tuple(vif(x, y).tolist()) if large else ())


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


def vif(x: Tensor, y: Tensor) -> Tensor:
    """Visual information fidelity per image, by torchmetrics, for x and the reference y [images, 3, height, width] in
    [0, 1], of at least 41 x 41 pixels: the share of what an observer could see in y, over four scales, that is left in
    x. Returns [images]; 1 for identical images (Sheikh and Bovik 2006, "Image information and visual quality", in the
    pixel domain).
    """
    image = require("torchmetrics.functional.image", extra="video")
    # One image at a time: windows take many times the memory of the image. The observer's noise is for 0 to 255.
    each = [image.visual_information_fidelity(255 * a[None], 255 * b[None]) for a, b in zip(x, y, strict=True)]
    return torch.stack(each)


def _mean(values: list[float], of_none: float) -> float:
    return sum(values) / len(values) if values else of_none
