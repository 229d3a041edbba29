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

    q [B, S, H, D] and k, v [B, S, Hkv, D] are in block order, after QK-norm and RoPE; `plan` is None for dense
    attention; `seconds` is the time of attention alone: permuting, selecting and attending, not the projections.
    Samples whose text differs in length make an event each. `step` counts the denoising steps of a generation from 0,
    as for settings that depend on it; `timestep` is what the transformer was given.
    """

    layer: int
    name: str
    step: int
    timestep: float
    layout: TileLayout
    plan: BlockPlan | None
    q: Tensor
    k: Tensor
    v: Tensor
    seconds: float


AttentionCallback = Callable[[AttentionEvent], None]


@dataclass(frozen=True)
class LayerReport:
    """One layer since the handle was made.

    requested_density: what the settings asked of the sparse calls, on average; None if they are no shares (top_k, say).
    delivered_density: what the plans of the sparse calls keep, as a share of block pairs.
    executed_density: what was computed in all calls, the dense ones included, as a share of pairs of tokens.
    calls, sparse_calls: all of them, and those that were sparse. The first two densities are 1 if there was none. Mochi
        calls attention once for each sample, and gradient checkpointing once more in the backward pass.
    attention_seconds: of attention alone.
    why_dense: of the last call that was dense; empty if there was none, or nothing was to be sparse.
    """

    layer: int
    name: str
    grid: tuple[int, ...]
    tile: tuple[int, ...]
    num_blocks: int
    requested_density: float | None
    delivered_density: float
    executed_density: float
    calls: int
    sparse_calls: int
    attention_seconds: float
    why_dense: str = ""


@dataclass(frozen=True)
class SparsityReport:
    """All layers. `str()` is a table; layers that have not run since the handle was made are absent."""

    layers: tuple[LayerReport, ...]

    @property
    def requested_density(self) -> float | None:
        """Mean over the sparse calls; None if a layer has none, 1 when nothing sparse has run."""
        shares = [(layer.requested_density, layer.sparse_calls) for layer in self.layers]
        if any(share is None for share, _ in shares):
            return None
        return _mean([(share, calls) for share, calls in shares if share is not None])

    @property
    def delivered_density(self) -> float:
        """Mean over the sparse calls; 1 when nothing sparse has run."""
        return _mean([(layer.delivered_density, layer.sparse_calls) for layer in self.layers])

    @property
    def executed_density(self) -> float:
        """Mean over all calls; 1 when nothing has run."""
        return _mean([(layer.executed_density, layer.calls) for layer in self.layers])

    @property
    def attention_seconds(self) -> float:
        """Seconds in self-attention, all layers and calls."""
        return sum(layer.attention_seconds for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no attention has run since the model was attached (calls inside torch.compile are not measured)"
        rows = ["layer            grid        tile  blocks   asked    kept     run  calls  sparse  seconds"]
        for layer in self.layers:
            rows.append(
                f"{layer.layer:>5}  {'x'.join(map(str, layer.grid)):>14}  {'x'.join(map(str, layer.tile)):>10}  "
                f"{layer.num_blocks:>6}  {_number(layer.requested_density):>6}  {layer.delivered_density:>6.3f}  "
                f"{layer.executed_density:>6.3f}  {layer.calls:>5}  {layer.sparse_calls:>6}  "
                f"{layer.attention_seconds:.3f}"
            )
        rows.append(
            f"all layers: density asked {_number(self.requested_density)}, kept {self.delivered_density:.3f}, "
            f"run {self.executed_density:.3f}; {self.attention_seconds:.3f} s in self-attention"
        )
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why_dense:
                reasons.setdefault(layer.why_dense, []).append(layer.name)
        for why, names in reasons.items():
            who = names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
            rows.append(f"dense calls of {who}: {why}")
        return "\n".join(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(weighted: list[tuple[float, int]]) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else 1.0
