"""PSNR, SSIM and VIF against values by hand and an independent implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from openvsa.errors import ShapeError
from openvsa.evaluate.quality import Quality, compare_clips

MakeClip = Callable[..., Tensor]


def test_psnr_of_a_constant_error_by_hand() -> None:
    reference = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    clip = reference.clone()
    clip[0] += 1
    clip[1] += 10
    # 20 log10(255 / error)
    assert compare_clips(clip, reference).psnr == pytest.approx((48.1308, 28.1308), abs=1e-4)


def test_ssim_of_two_constants_by_hand() -> None:
    reference = torch.full((1, 16, 16, 3), 51, dtype=torch.uint8)
    clip = torch.full((1, 16, 16, 3), 102, dtype=torch.uint8)
    # Without variance SSIM is (2 x y + c1) / (x^2 + y^2 + c1) with x = 0.2, y = 0.4 and c1 = 0.01^2.
    assert compare_clips(clip, reference).ssim[0] == pytest.approx(0.1601 / 0.2001, abs=1e-4)


def noisy(clip: Tensor, size: int) -> Tensor:
    noise = torch.randint(-size, size, clip.shape, generator=torch.Generator().manual_seed(0))
    return (clip.int() + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_agrees_with_torchmetrics(make_clip: MakeClip) -> None:
    reference = make_clip(3, 40, 56)
    quality = compare_clips(noisy(reference, 40), reference)
    x, y = (c.movedim(-1, 1).float() / 255 for c in (noisy(reference, 40), reference))
    psnr = [peak_signal_noise_ratio(a[None], b[None], data_range=1.0).item() for a, b in zip(x, y, strict=True)]
    assert quality.psnr == pytest.approx(psnr, abs=1e-3)


@pytest.mark.parametrize("measure", ["ssim", "vif"])
def test_more_noise_is_less_alike_in_every_frame(make_clip: MakeClip, measure: str) -> None:
    reference = make_clip(3, 41, 56)
    little, much = (getattr(compare_clips(noisy(reference, size), reference), measure) for size in (5, 40))
    assert len(little) == 3
    assert all(1 > a > b > 0 for a, b in zip(little, much, strict=True))


def test_vif_of_half_the_contrast_by_hand() -> None:
    """Without noise the share is that of the logarithms of the signal's power over the observer's noise."""
    reference = (
        torch.randint(0, 2, (1, 64, 64, 1), generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 3) * 200
    )
    clip = reference // 2 + 50
    found = compare_clips(clip.to(torch.uint8), reference.to(torch.uint8)).vif[0]
    # Variances at the four scales are unknown, but large against the noise of 2: ln(v / 8) / ln(v / 2) for each.
    assert 0.7 < found < 1 - math.log(4) / math.log(200**2)


def test_small_frames_have_no_vif(make_clip: MakeClip) -> None:
    quality = compare_clips(make_clip(2, 40, 56), make_clip(2, 40, 56))
    assert quality.vif == ()
    assert quality.mean_vif is None
    assert "VIF" not in str(quality)


def test_identical_frames_do_not_flatter_the_mean() -> None:
    quality = Quality(psnr=(math.inf, 30.0, 20.0), ssim=(1.0, 0.8, 0.6), vif=(1.0, 0.6, 0.2))
    assert quality.mean_psnr == 25.0
    assert quality.mean_ssim == pytest.approx(0.7)
    assert quality.mean_vif == pytest.approx(0.4)
    assert str(quality) == "PSNR 25.0 dB, SSIM 0.700, VIF 0.400"


def test_identical_clips(make_clip: MakeClip) -> None:
    clip = make_clip(2, 16, 16)
    quality = compare_clips(clip, clip.clone())
    assert quality.psnr == (math.inf, math.inf)
    assert quality.mean_psnr == math.inf
    assert quality.ssim == pytest.approx((1.0, 1.0))
    assert quality.mean_ssim == 1.0
    assert compare_clips(make_clip(2, 41, 41), make_clip(2, 41, 41)).vif == pytest.approx((1.0, 1.0))


def test_shapes_must_match_and_hold_a_window(make_clip: MakeClip) -> None:
    with pytest.raises(ShapeError, match=r"\[2, 16, 16, 3\] and \[2, 16, 18, 3\]"):
        compare_clips(make_clip(2, 16, 16), make_clip(2, 16, 18))
    with pytest.raises(ShapeError, match=r"at least 11 x 11 pixels, got \[10, 16\]"):
        compare_clips(make_clip(1, 10, 16), make_clip(1, 10, 16))
