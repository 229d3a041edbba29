"""Everything known about one dense and one sparse generation of the same clip."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from openvsa.evaluate.quality import Quality
from openvsa.evaluate.recorder import AttentionRecord

__all__ = ["Comparison", "Figures", "LayerFigures", "PassTime", "Settings", "finite_or_none"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the clips were made. `density` is the one asked for, None if it was no share; `credit` names the source of
    the scene; `model` is None for the one that is part of the package; `sparsity` is what SparsityConfig.from_dict
    takes."""

    scene: str
    seed: int
    steps: int
    density: float | None
    fps: float
    device: str
    threads: int
    command: str
    versions: Mapping[str, str]
    credit: str
    model: str | None = None
    sparsity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassTime:
    """Wall time of one generation in seconds, and the part of it spent in self-attention."""

    total_seconds: float
    attention_seconds: float

    @property
    def rest_seconds(self) -> float:
        return self.total_seconds - self.attention_seconds


@dataclass(frozen=True)
class LayerFigures:
    """One attention layer: the share of pairs computed, seconds summed over all steps of each generation, and why calls
    of it stayed dense, if any did."""

    layer: int
    name: str
    density: float
    dense_seconds: float
    sparse_seconds: float
    why_dense: str = ""

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.sparse_seconds


@dataclass(frozen=True)
class Figures:
    """All numbers of a comparison; what `report.json` holds.

    kept_density: what the sparse calls kept, as a share of pairs of tiles; None in files of before 0.1.
    branch: the weights have a compressed branch. The clip with full attention is then one over all tiles with the
        branch, as the model is another without it; the times of full attention are those without the branch.
    """

    settings: Settings
    dense: PassTime
    sparse: PassTime
    layers: tuple[LayerFigures, ...]
    quality: Quality
    kept_density: float | None = None
    branch: bool = False

    @property
    def speedup(self) -> float:
        """Wall time of the dense generation over that of the sparse one."""
        return self.dense.total_seconds / self.sparse.total_seconds

    @property
    def attention_speedup(self) -> float:
        """The same for self-attention alone."""
        return self.dense.attention_seconds / self.sparse.attention_seconds

    @property
    def density(self) -> float:
        """The share of pairs computed, mean over layers."""
        return sum(layer.density for layer in self.layers) / len(self.layers)

    @property
    def why_dense(self) -> dict[str, list[str]]:
        """Why calls stayed dense -> names of the layers."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why_dense:
                found.setdefault(layer.why_dense, []).append(layer.name)
        return found

    def to_json(self) -> str:
        """Strict JSON: a PSNR that is infinite is written as null. The derived figures are included for readers."""
        content = asdict(self)
        content["quality"]["psnr"] = [finite_or_none(value) for value in self.quality.psnr]
        content["derived"] = {
            "speedup": self.speedup,
            "attention_speedup": self.attention_speedup,
            "density": self.density,
            "mean_psnr": finite_or_none(self.quality.mean_psnr),
            "mean_ssim": self.quality.mean_ssim,
            "mean_vif": self.quality.mean_vif,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Figures:
        """The inverse of `to_json`."""
        content = json.loads(text)
        psnr = (math.inf if value is None else value for value in content["quality"]["psnr"])
        return cls(
            settings=Settings(**content["settings"]),
            dense=PassTime(**content["dense"]),
            sparse=PassTime(**content["sparse"]),
            layers=tuple(LayerFigures(**layer) for layer in content["layers"]),
            quality=Quality(tuple(psnr), tuple(content["quality"]["ssim"]), tuple(content["quality"].get("vif", ()))),
            kept_density=content.get("kept_density"),
            branch=content.get("branch", False),
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The figures, both clips (uint8 [frames, height, width, 3]) and where the sparse attention looked."""

    figures: Figures
    dense_clip: Tensor
    sparse_clip: Tensor
    attention: AttentionRecord | None


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
