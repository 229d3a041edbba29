"""Everything that decides what a training run does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvsa.errors import OpenVSAError
from openvsa.models.scenes import FilmShots

__all__ = ["PRESETS", "TrainConfig", "preset"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. The defaults are the recipe of the model in the package; `preset` gives the named variants.

    Args:
        out: folder for the model, the loss curve (curve.jsonl) and the sample sheet (samples.png).
        film: a local copy of the film; None downloads it into `cache`.
        minutes, steps: how long to train, one of the two. Minutes count the training loop alone.
        pause_at: stop when this share of the run is done, leaving a checkpoint from which `resume` goes on.
        checkpoint: the file of the checkpoint, written at every evaluation and at the end.
        seed: of the weights that the run begins with and of everything it draws; None is 0, or what a resumed run has.
        device: where to train; "cuda" runs the model in bf16, "cpu" in fp32; the weights are fp32.
        densities: of self-attention; one of them is drawn per step, so that one set of weights serves all.
        drop_shot: the share of clips whose shot the model is not told.
        scene_share: the share of clips drawn near the start frames of the named training scenes.
        noise_spread, noise_shift: noise levels are logit-normal with this standard deviation, then shifted towards
            more noise as the sampler's are (Esser et al. 2024, arXiv:2403.03206, sections 3.1 and 5.3.2).
        matrix_lr, other_lr: peak learning rates of Muon for the hidden matrices and of AdamW for the rest.
        decay_share: the last share of the run, over which the learning rate falls linearly to zero.
        ema_decay: of the averaged weights, which are the ones evaluated and saved.

    Raises:
        OpenVSAError: not exactly one of `minutes` and `steps` is given, or a number is out of its range.
    """

    out: Path
    film: Path | None = None
    cache: Path = Path.home() / ".cache" / "openvsa"
    minutes: float | None = None
    steps: int | None = None
    pause_at: float = 1.0
    checkpoint: Path | None = None
    resume: bool = False
    device: str = "cpu"
    compile: bool = False
    seed: int | None = None

    shots: FilmShots = field(default_factory=FilmShots.bundled)
    frame_size: tuple[int, int] = (144, 256)
    num_frames: int = 24
    stride: int = 2
    num_components: int = 96

    num_heads: int = 4
    head_dim: int = 64
    num_layers: int = 6
    densities: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    batch_size: int = 16
    drop_shot: float = 0.15
    scene_share: float = 0.5
    noise_spread: float = 1.4
    noise_shift: float = 3.0
    matrix_lr: float = 3e-3
    other_lr: float = 1.5e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    warmup_steps: int = 100
    decay_share: float = 0.25
    ema_decay: float = 0.999

    log_every: int = 50
    evaluate_every: int = 500
    evaluation_clips: int = 16
    evaluation_levels: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    evaluation_densities: tuple[float, ...] = (0.25, 1.0)
    sample_steps: int = 16

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise OpenVSAError(f"give one of minutes and steps, got minutes={self.minutes} and steps={self.steps}")
        if not (self.minutes or self.steps or 0) > 0:  # also if it is no number
            raise OpenVSAError(f"a run must be longer than nothing, got minutes={self.minutes}, steps={self.steps}")
        shares = {"pause_at": (self.pause_at,), "decay_share": (self.decay_share,), "densities": self.densities}
        for name, values in shares.items():
            if not values or not all(0 < share <= 1 for share in values):
                raise OpenVSAError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("batch_size", "warmup_steps", "log_every", "evaluate_every", "evaluation_clips", "sample_steps"):
            if getattr(self, name) < 1:
                raise OpenVSAError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise OpenVSAError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.checkpoint is None and (self.resume or self.pause_at < 1):
            raise OpenVSAError("to pause or resume a run, give the file of its checkpoint")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done, in [0, 1]."""
        done = step / self.steps if self.steps else seconds / (60 * (self.minutes or 1))
        return min(1.0, done)

    def lr_factor(self, step: int, progress: float) -> float:
        """Warm-up by steps, a plateau, and a linear fall to zero over the last `decay_share` of the run."""
        return min(1.0, (step + 1) / self.warmup_steps, (1 - progress) / self.decay_share)


def _miniature_shots() -> FilmShots:
    """The first shots of the film, the last three of which are held out."""
    whole = FilmShots.bundled()
    return FilmShots(whole.cuts[:10], held_out_from=6, end=whole.cuts[9])


PRESETS: dict[str, Any] = {
    "bundled": lambda: {"minutes": 7.8},
    # The same code in seconds on a CPU: it shows that the recipe runs and that the loss falls, no more.
    "miniature": lambda: {
        "steps": 40,
        "shots": _miniature_shots(),
        "frame_size": (72, 128),
        "num_frames": 8,
        "num_components": 32,
        "num_heads": 2,
        "head_dim": 32,
        "num_layers": 2,
        "batch_size": 2,
        "warmup_steps": 2,
        "ema_decay": 0.8,
        "log_every": 5,
        "evaluate_every": 20,
        "evaluation_clips": 2,
        "evaluation_levels": (0.4, 0.8),
        "evaluation_densities": (0.25,),
        "sample_steps": 4,
    },
}


def preset(name: str, **changes: Any) -> TrainConfig:
    """The configuration of a preset ("bundled" or "miniature") with `changes`; a new length replaces the preset's.

    Raises `OpenVSAError` when there is no such preset.
    """
    if name not in PRESETS:
        raise OpenVSAError(f"there is no preset {name!r}; choose one of: {', '.join(PRESETS)}")
    settings = PRESETS[name]()
    if {"minutes", "steps"} & changes.keys():
        settings = {key: value for key, value in settings.items() if key not in ("minutes", "steps")}
    return TrainConfig(**{**settings, **changes})
