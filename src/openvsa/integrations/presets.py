"""Settings to start from, by family of models.

Models that were trained with full attention start as those who make them sparse without training agree: about a quarter
of the keys (Sparse VideoGen keeps 0.25 to 0.3), the first fifth of the steps dense (Sparse VideoGen 0.075 to 0.2,
SparseVideo 0.1, ComfyUI 0.2, Radial Attention 12 steps of 50), and the first 3 % of the layers dense (Sparse VideoGen
and SparseVideo 0.03, Radial Attention the first). Sources: the configurations of svg-project/Sparse-VideoGen (arXiv
2502.01776), mit-han-lab/radial-attention (arXiv 2506.19852), the package sparsevideo 0.1.0, and ComfyUI's
BlockSparseAttention node. What they cost the bundled model is in docs/presets.md; on other weights `openvsa audit` says
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openvsa.errors import OpenVSAError
from openvsa.select import ReleasedVSA

__all__ = ["PRESETS", "Preset", "TrainedPreset"]


@dataclass(frozen=True)
class Preset:
    """What a preset sets, for models that were trained with full attention.

    steps: denoising steps of a generation, those that the family's pipeline takes by default.
    dense_share: the share of the steps that is dense, at the beginning.
    """

    density: float = 0.25
    steps: int = 50
    dense_share: float = 0.2
    dense_layers: tuple[int | str, ...] = (0,)

    def settings(self, steps: int | None) -> dict[str, Any]:
        """The arguments of a SparsityConfig, for so many steps."""
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise OpenVSAError(f"steps must be a whole number >= 1, got {steps!r}")
        return {
            "density": self.density,
            "dense_first_steps": round(self.dense_share * (steps or self.steps)),
            "dense_layers": self.dense_layers,
        }


@dataclass(frozen=True)
class TrainedPreset:
    """Weights trained with VSA: sparse in all steps and layers, as their authors run them at this sparsity."""

    sparsity: float

    def settings(self, steps: int | None) -> dict[str, Any]:
        """The arguments of a SparsityConfig; the number of steps does not matter."""
        method = ReleasedVSA(self.sparsity)
        return {"budget": method.budget, "selector": method, "tile": method.tile}


PRESETS: dict[str, Preset | TrainedPreset] = {
    "wan": Preset(),
    "hunyuan_video": Preset(dense_layers=(0, 1)),
    "hunyuan_video15": Preset(dense_layers=(0, 1)),
    "ltx": Preset(),
    "ltx2": Preset(steps=30),
    "cogvideox": Preset(),
    "mochi": Preset(steps=64),
    "cosmos": Preset(steps=36),
    "kandinsky5": Preset(),
    "flux": Preset(steps=28, dense_layers=(0, 1)),
    # FastWan2.1-T2V-1.3B, and Wan2.1-VSA-T2V-14B-720P and FastWan2.1-T2V-14B-480P, by the cards of FastVideo's models.
    "vsa-1.3b": TrainedPreset(0.8),
    "vsa-14b": TrainedPreset(0.9),
}
"""By the name of the family's module; for weights that were trained with VSA by the size of the model."""
