"""A linear tokenizer: small space-time cells of pixels, and their coordinates along principal axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from openvsa.errors import ShapeError

__all__ = ["PatchTokenizer"]

# Axis i is scaled by std_i ** (_TEMPER - 1): 1 would leave the spectrum alone, 0 would whiten it. Half way, fine
# detail stays small, so that the model does not spend itself on noise, and yet is not lost in the diffusion noise.
_TEMPER = 0.5


class PatchTokenizer(ModelMixin, ConfigMixin):
    """Cuts a video into cells and writes each cell in the axes along which clips change most.

    A cell is `cell` = (frames, height, width) pixels in three colours, and becomes `num_components` numbers: an
    orthonormal projection (principal axes of the difference between a clip and its first frame), then one fixed factor
    per axis. Encoding and decoding are one matrix product each. There is nothing learned by gradient descent.

    Besides the axes it holds what a model of such latents needs to know about them: `still_std` [C], the spread of a
    still frame's latents, and `change_std` [C, T], the spread of (clip - its first frame held still) per time cell.
    """

    mean: Tensor
    axes: Tensor
    factors: Tensor
    still_std: Tensor
    change_std: Tensor

    @register_to_config
    def __init__(
        self, num_components: int = 96, cell: tuple[int, int, int] = (2, 8, 8), num_time_cells: int = 12
    ) -> None:
        super().__init__()
        self.cell = tuple(cell)
        size = 3 * cell[0] * cell[1] * cell[2]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("axes", torch.eye(size, num_components))
        self.register_buffer("factors", torch.ones(num_components))
        self.register_buffer("still_std", torch.ones(num_components))
        self.register_buffer("change_std", torch.ones(num_components, num_time_cells))

    def encode(self, video: Tensor) -> Tensor:
        """Latents `[B, C, T / ct, H / ch, W / cw]` (fp32) of a video `[B, 3, T, H, W]` with values in [-1, 1].

        Raises `ShapeError` when the video is not a whole number of cells.
        """
        cells = (self._to_cells(video) - self.mean) @ (self.axes * self.factors)
        return cells.movedim(-1, 1)

    def encode_still(self, frame: Tensor) -> Tensor:
        """Latents `[B, C, 1, H / ch, W / cw]` of a frame `[B, 3, H, W]` held still for one time cell."""
        return self.encode(frame.unsqueeze(2).expand(-1, -1, self.cell[0], -1, -1))

    def decode(self, latents: Tensor) -> Tensor:
        """Video `[B, 3, T, H, W]` (fp32, not clipped) of latents `[B, C, T / ct, H / ch, W / cw]`."""
        cells = latents.movedim(1, -1).float() @ (self.axes / self.factors).T + self.mean
        ct, ch, cw = self.cell
        batch, t, h, w, _ = cells.shape
        cells = cells.view(batch, t, h, w, 3, ct, ch, cw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return cells.reshape(batch, 3, t * ct, h * ch, w * cw)

    def latent_shape(self, video_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the latents of a video of the given shape."""
        batch, _, *size = video_shape
        return (batch, self.axes.shape[1], *(n // c for n, c in zip(size, self.cell, strict=True)))

    def _to_cells(self, video: Tensor) -> Tensor:
        ct, ch, cw = self.cell
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % ct or video.shape[3] % ch or video.shape[4] % cw:
            raise ShapeError(
                f"a video is [batch, 3, frames, height, width] with whole cells of {self.cell}, got {list(video.shape)}"
            )
        batch, _, t, h, w = video.shape
        cells = video.float().view(batch, 3, t // ct, ct, h // ch, ch, w // cw, cw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return cells.reshape(batch, t // ct, h // ch, w // cw, -1)

    @classmethod
    def fit(
        cls, clips: Iterable[Tensor], *, num_components: int = 96, cell: tuple[int, int, int] = (2, 8, 8)
    ) -> PatchTokenizer:
        """The tokenizer (on the CPU) of clips `[B, 3, T, H, W]` of one length T, in one pass and constant memory.

        The factors make the mean square of (clip - first frame held still) 1 over all latents.
        """
        raw = cls(num_components=num_components, cell=cell)
        count, size = 0, len(raw.mean)
        total = torch.zeros(size, dtype=torch.float64)
        still_square, change_square = total.new_zeros(size, size), total.new_zeros(1, size, size)
        for clip in clips:
            cells = raw._to_cells(clip)
            still = raw._to_cells(clip[:, :, :1].expand(-1, -1, cell[0], -1, -1))
            change = (cells - still).transpose(0, 1).flatten(1, 3)
            still = still.flatten(0, 3)
            count += len(still)
            total += still.sum(0).cpu()
            still_square += (still.T @ still).cpu()
            change_square = change_square + (change.transpose(1, 2) @ change).cpu()
        if count == 0:
            raise ShapeError("the tokenizer cannot be fitted to an empty stream of clips")
        mean = total / count
        change_cov = change_square / count
        variances, axes = torch.linalg.eigh(change_cov.mean(0))
        axes, std = axes.flip(1)[:, :num_components], variances.flip(0)[:num_components].clamp_min(1e-8).sqrt()
        factors = std ** (_TEMPER - 1) / (std ** (2 * _TEMPER)).mean().sqrt()
        scaled = axes * factors
        still_cov = still_square / count - torch.outer(mean, mean)
        fitted = cls(num_components=num_components, cell=cell, num_time_cells=len(change_cov))
        fitted.mean.copy_(mean)
        fitted.axes.copy_(axes)
        fitted.factors.copy_(factors)
        fitted.still_std.copy_((scaled * (still_cov @ scaled)).sum(0).clamp_min(1e-8).sqrt())
        fitted.change_std.copy_((scaled * (change_cov @ scaled)).sum(1).clamp_min(1e-8).sqrt().T)
        return fitted
