"""What an attached model did: settings, delivered density and time, per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan

__all__ = ["AttentionCallback", "AttentionEvent", "LayerReport", "SparsityReport"]


@dataclass(frozen=True)
class AttentionEvent:
    """One self-attention call, as `on_attention` callbacks see it.

    q and k are [B, S, H, D] in block order, after QK-norm and RoPE; `plan` is None for dense attention; `seconds`
    is the time of attention alone: permuting, selecting and attending, not the projections.
    """

    layer: int
    name: str
    timestep: float
    layout: TileLayout
    plan: BlockPlan | None
    q: Tensor
    k: Tensor
    seconds: float


AttentionCallback = Callable[[AttentionEvent], None]


@dataclass(frozen=True)
class LayerReport:
    """One layer since the handle was made: densities are shares of block pairs, seconds are of attention alone."""

    layer: int
    name: str
    grid: tuple[int, ...]
    tile: tuple[int, ...]
    num_blocks: int
    requested_density: float | None
    delivered_density: float
    calls: int
    attention_seconds: float


@dataclass(frozen=True)
class SparsityReport:
    """All layers. `str()` is a table; layers that have not run since the handle was made are absent."""

    layers: tuple[LayerReport, ...]

    @property
    def delivered_density(self) -> float:
        """Mean over layers, weighted by calls; 1 when nothing has run."""
        calls = sum(layer.calls for layer in self.layers)
        return sum(layer.delivered_density * layer.calls for layer in self.layers) / calls if calls else 1.0

    @property
    def attention_seconds(self) -> float:
        """Seconds in self-attention, all layers and calls."""
        return sum(layer.attention_seconds for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no attention has run since the model was attached (calls inside torch.compile are not measured)"
        rows = ["layer            grid        tile  blocks   asked    kept  calls  seconds"]
        for layer in self.layers:
            asked = "-" if layer.requested_density is None else f"{layer.requested_density:.3f}"
            rows.append(
                f"{layer.layer:>5}  {'x'.join(map(str, layer.grid)):>14}  {'x'.join(map(str, layer.tile)):>10}  "
                f"{layer.num_blocks:>6}  {asked:>6}  {layer.delivered_density:>6.3f}  {layer.calls:>5}  "
                f"{layer.attention_seconds:.3f}"
            )
        rows.append(
            f"all layers: density {self.delivered_density:.3f}, {self.attention_seconds:.3f} s in self-attention"
        )
        return "\n".join(rows)
