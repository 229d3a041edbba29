"""Clips of a film that lies in memory, cut out on the fly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError
from openvsa.models.scenes import FilmShots

__all__ = ["Clips"]

# A clip for a named scene starts at most this many film frames before or after the scene's start frame.
_SCENE_JITTER = 12


class Clips:
    """All clips of `num_frames` frames, `stride` film frames apart, that lie inside one shot.

    Args:
        frames: the film, uint8 `[N, 3, H, W]`, on the device where the clips are wanted.
        scene_starts: start frames in training shots that are drawn more often than the others.
        scene_share: the share of clips drawn near `scene_starts`.
    """

    def __init__(
        self,
        frames: Tensor,
        shots: FilmShots,
        *,
        num_frames: int,
        stride: int,
        scene_starts: Sequence[int] = (),
        scene_share: float = 0.0,
    ) -> None:
        self.frames, self.shots = frames, shots
        self.offsets = torch.arange(num_frames, device=frames.device) * stride
        self.training, self.held_out = [], []
        self._span = 1 + (num_frames - 1) * stride
        for shot, (begin, end) in enumerate(zip(shots.cuts[:-1], shots.cuts[1:], strict=True)):
            starts = range(begin, min(end, shots.end) - self._span + 1)
            (self.training if shot < shots.held_out_from else self.held_out).extend(starts)
        if not self.training or not self.held_out:
            raise OpenVSAError(f"no shot for training, or none held out, is as long as a clip ({self._span} frames)")
        self._near_scenes = [self._near(start) for start in scene_starts]
        self._scene_share = scene_share if self._near_scenes else 0.0

    def _near(self, start: int) -> range:
        shot = self.shots.shot_at(start)
        first = max(self.shots.cuts[shot], start - _SCENE_JITTER)
        last = min(self.shots.cuts[shot + 1] - self._span, start + _SCENE_JITTER)
        return range(first, last + 1)

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Start frames of `count` random training clips."""
        starts = []
        for which, where in torch.rand(count, 2, generator=generator, dtype=torch.float64).tolist():
            if which < self._scene_share:
                near = self._near_scenes[int(which / self._scene_share * len(self._near_scenes))]
                starts.append(near[int(where * len(near))])
            else:
                starts.append(self.training[int(where * len(self.training))])
        return starts

    def rows(self, starts: Sequence[int]) -> list[int]:
        """The rows of the table of shot tokens for clips that begin at `starts`."""
        return [self.shots.row(self.shots.shot_at(start)) for start in starts]

    def load(self, starts: Sequence[int]) -> Tensor:
        """The clips that begin at `starts`: fp32 `[B, 3, T, H, W]` in [-1, 1]."""
        first = torch.tensor(starts).to(self.frames.device, non_blocking=True)
        clips = self.frames[first[:, None] + self.offsets]
        return clips.transpose(1, 2).float() / 127.5 - 1
