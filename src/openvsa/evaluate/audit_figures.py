"""The numbers of an audit: what `audit.json` holds, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from openvsa.evaluate.audit_attention import CallFigures, CurvePoint
from openvsa.evaluate.comparison import PassTime, finite_or_none
from openvsa.evaluate.quality import Quality
from openvsa.integrations.config import SparsityConfig
from openvsa.select import BudgetTable

__all__ = ["AuditFigures", "AuditSettings", "CallAudit", "DenseCall", "ForwardAudit", "SparseRun", "TimedDensity"]

_VERSION = 1

_OF_LAYERS = {
    "density": "density", "recall": "recall", "oracle_recall": "oracle_recall", "relative_error": "error",
    "oracle_relative_error": "oracle_error",
}  # fmt: skip
"""Key under `derived.layers` -> what of `AuditFigures.layer_mean`."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What was audited and how.

    density: the one asked for where no table says otherwise; None if the budget is no share. grid, tile: of the video,
    in tokens. query_blocks: looked at in each call. config: the settings of the sparse generation; None in audits from
    before they were recorded, which had a density alone. branch: the model has a compressed branch, which is part of
    what is called full attention then.
    """

    model: str
    subject: str
    command: str
    seed: int
    steps: int
    density: float | None
    grid: tuple[int, ...]
    tile: tuple[int, ...]
    num_tiles: int
    query_blocks: int
    device: str
    threads: int
    versions: Mapping[str, str]
    config: SparsityConfig | None = None
    branch: bool = False


@dataclass(frozen=True)
class DenseCall:
    """A layer that the settings leave dense in a step that was looked at, and why, in words."""

    step: int
    layer: int
    name: str
    why: str


@dataclass(frozen=True)
class CallAudit:
    """The self-attention of one layer in one denoising step, on the inputs that dense attention had."""

    step: int
    timestep: float
    layer: int
    name: str
    figures: CallFigures

    @property
    def error(self) -> float:
        """Norm of the error of the layer's attention output over the norm of the output, all heads together."""
        return _ratio(self.figures.error, self.figures.output)

    @property
    def oracle_error(self) -> float:
        """The same with the best tiles of the same number."""
        return _ratio(self.figures.oracle_error, self.figures.output)

    @property
    def head_errors(self) -> tuple[float, ...]:
        """`error` of each head alone."""
        return tuple(_ratio((e,), (o,)) for e, o in zip(self.figures.error, self.figures.output, strict=True))


@dataclass(frozen=True)
class ForwardAudit:
    """One forward of the transformer, repeated with its own inputs.

    error: norm of the change of its prediction over the norm of the prediction, sparse as the settings say. moved: norm
    of the way that the latents go in this step (of the first, which no pipeline tells, that of the second). gains:
    layer -> for each head, the share of the squared change that vanishes when this head alone is made dense (below 0 if
    it grows); one entry for the whole layer if layers were measured; empty unless a table was asked for. budgeted: the
    same as `error` with the table.
    """

    step: int
    error: float
    moved: float
    gains: Mapping[str, tuple[float, ...]]
    budgeted: float | None


@dataclass(frozen=True)
class SparseRun:
    """One sparse generation against the dense one from the same noise.

    density: executed, the share of all pairs of tokens that was computed, mean over layers and calls, the dense ones
    included. latents_error: norm of the change of the final latents over their norm. requested, delivered: what was
    asked of the sparse calls and what their plans keep, means over them; None where the budget is no share, and in
    audits from before they were recorded.
    """

    density: float
    time: PassTime
    quality: Quality
    latents_error: float
    requested: float | None = None
    delivered: float | None = None


@dataclass(frozen=True)
class TimedDensity:
    """Seconds of all self-attention in one forward at a delivered density."""

    density: float
    seconds: float


@dataclass(frozen=True)
class AuditFigures:
    """All numbers of an audit. times: one forward at several densities; dense_forward: its dense attention, seconds.
    dense_steps: steps of the generation in which every layer stays dense -> why. dense_calls: layers that do in the
    steps that were looked at. Neither is among `calls`.
    """

    settings: AuditSettings
    calls: tuple[CallAudit, ...]
    forwards: tuple[ForwardAudit, ...]
    dense: PassTime
    sparse: SparseRun
    dense_forward: float
    times: tuple[TimedDensity, ...]
    table: BudgetTable | None
    budgeted: SparseRun | None
    dense_steps: Mapping[int, str] = field(default_factory=dict)
    dense_calls: tuple[DenseCall, ...] = ()

    @property
    def layers(self) -> dict[int, str]:
        """Layer -> name, those that stay dense included."""
        names = {call.layer: call.name for call in (*self.calls, *self.dense_calls)}
        return dict(sorted(names.items()))

    @property
    def dense_layers(self) -> dict[int, str]:
        """Layer -> why, of those that stay dense in every step that was looked at."""
        sparse = {call.layer for call in self.calls}
        return {call.layer: call.why for call in self.dense_calls if call.layer not in sparse}

    @property
    def steps(self) -> dict[int, float]:
        """Audited step -> timestep."""
        return {call.step: call.timestep for call in sorted(self.calls, key=lambda call: call.step)}

    @property
    def recall(self) -> float:
        """Share of the exact attention mass on kept blocks, mean over calls and heads."""
        return _mean([share for call in self.calls for share in call.figures.recall])

    @property
    def density(self) -> float:
        """What that is compared with: the share of pairs of blocks that the plans keep, mean over calls and heads."""
        return _mean([share for call in self.calls for share in call.figures.density])

    @property
    def oracle_recall(self) -> float:
        """The same for the best plan of the same density."""
        return _mean([share for call in self.calls for share in call.figures.oracle_recall])

    @property
    def ceiling(self) -> float:
        """How much faster the whole generation would be if attention took no time (Amdahl)."""
        return self.dense.total_seconds / self.dense.rest_seconds

    @property
    def break_even(self) -> float | None:
        """The density below which sparse attention is faster than dense: on the straight line between the two of
        `times` that `dense_forward` lies between, the lower ones if that is so twice. 1 where sparse attention was
        faster at all of them; None where it was not even at the lowest."""
        before = None
        for at in self.times:
            if at.seconds >= self.dense_forward:
                if before is None:
                    return None
                share = (self.dense_forward - before.seconds) / (at.seconds - before.seconds)
                return before.density + share * (at.density - before.density)
            before = at
        return 1.0

    @property
    def overhead(self) -> float:
        """Seconds of a forward's sparse attention that no density saves: the line through `times` (least squares) at
        density 0, and not less than 0."""
        x, y = [at.density for at in self.times], [at.seconds for at in self.times]
        mean_x, mean_y = _mean(x), _mean(y)
        spread = sum((a - mean_x) ** 2 for a in x)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
        return max(0.0, mean_y - slope * mean_x)

    @property
    def table_is_better(self) -> bool | None:
        """Whether the clip with the table is nearer to the dense one than the uniform one is, in PSNR and in the final
        latents; None without a table."""
        if self.budgeted is None:
            return None
        ours, uniform = self.budgeted, self.sparse
        return ours.quality.mean_psnr > uniform.quality.mean_psnr and ours.latents_error < uniform.latents_error

    def layer_mean(self, layer: int, what: str) -> float:
        """Mean over the audited steps of a layer's `error` or `oracle_error`, or of its heads' `density`, `recall` or
        `oracle_recall`."""
        values = [
            [getattr(call, what)] if what in ("error", "oracle_error") else getattr(call.figures, what)
            for call in self.calls
            if call.layer == layer
        ]
        return _mean([value for of_call in values for value in of_call])

    def curve(self) -> list[tuple[float, float]]:
        """Relative output error against delivered density, root of the mean square over calls, ascending."""
        points = []
        for index in range(len(self.calls[0].figures.curve)):
            of_calls = [(call.figures.curve[index], call.figures.output) for call in self.calls]
            density = _mean([_mean(list(point.density)) for point, _ in of_calls])
            points.append((density, math.sqrt(_mean([sum(p.error) / max(sum(o), 1e-30) for p, o in of_calls]))))
        return points

    def to_json(self) -> str:
        """Strict JSON, an infinite PSNR as null; what follows from the numbers is included for readers."""
        content = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("table", "settings")}
        settings = asdict(replace(self.settings, config=None))
        settings["config"] = self.settings.config.to_dict() if self.settings.config else None
        content = {"version": _VERSION, "settings": settings} | _plain(content)
        for call, plain in zip(self.calls, content["calls"], strict=True):
            plain |= {
                "relative_error": call.error,
                "oracle_relative_error": call.oracle_error,
                "head_relative_errors": list(call.head_errors),
            }
        content["table"] = json.loads(self.table.to_json()) if self.table else None
        for run in ("sparse", "budgeted"):
            if content[run]:
                content[run]["quality"]["psnr"] = [finite_or_none(v) for v in content[run]["quality"]["psnr"]]
        content["derived"] = {
            "recall": self.recall,
            "oracle_recall": self.oracle_recall,
            "density": self.density,
            "layers": [
                {"layer": layer, "name": name} | {key: self.layer_mean(layer, what) for key, what in _OF_LAYERS.items()}
                for layer, name in self.layers.items()
                if layer not in self.dense_layers
            ],
            "amdahl_ceiling": self.ceiling,
            "break_even_density": self.break_even,
            "overhead_seconds": self.overhead,
            "error_by_density": self.curve(),
            "speedup": self.dense.total_seconds / self.sparse.time.total_seconds,
            "attention_speedup": self.dense.attention_seconds / self.sparse.time.attention_seconds,
            "table_is_better": self.table_is_better,
        }
        for name, run in (("sparse", self.sparse), ("budgeted", self.budgeted)):
            if run:
                of = run.quality
                mean = {"psnr": finite_or_none(of.mean_psnr), "ssim": of.mean_ssim, "vif": of.mean_vif}
                content["derived"][name] = mean
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AuditFigures:
        """The inverse of `to_json`."""
        content = json.loads(text)
        settings = content["settings"]
        settings |= {name: tuple(settings[name]) for name in ("grid", "tile")}
        if settings.get("config"):
            settings["config"] = SparsityConfig.from_dict(settings["config"])

        def run(found: dict[str, Any] | None) -> SparseRun | None:
            if found is None:
                return None
            psnr = tuple(math.inf if value is None else value for value in found["quality"]["psnr"])
            quality = Quality(psnr, tuple(found["quality"]["ssim"]), tuple(found["quality"].get("vif", ())))
            return SparseRun(**(found | {"time": PassTime(**found["time"]), "quality": quality}))

        def figures(found: dict[str, Any]) -> CallFigures:
            curve = (CurvePoint(p["asked"], tuple(p["density"]), tuple(p["error"])) for p in found["curve"])
            return CallFigures(**{k: tuple(v) for k, v in found.items() if k != "curve"}, curve=tuple(curve))

        def call(found: dict[str, Any]) -> CallAudit:
            place = found["step"], found["timestep"], found["layer"], found["name"]
            return CallAudit(*place, figures(found["figures"]))

        sparse = run(content["sparse"])
        assert sparse is not None
        return cls(
            AuditSettings(**settings),
            tuple(map(call, content["calls"])),
            tuple(
                ForwardAudit(**(forward | {"gains": {name: tuple(of) for name, of in forward["gains"].items()}}))
                for forward in content["forwards"]
            ),
            PassTime(**content["dense"]),
            sparse,
            content["dense_forward"],
            tuple(TimedDensity(**at) for at in content["times"]),
            BudgetTable.from_json(json.dumps(content["table"])) if content["table"] else None,
            run(content["budgeted"]),
            {int(step): why for step, why in content.get("dense_steps", {}).items()},
            tuple(DenseCall(**found) for found in content.get("dense_calls", ())),
        )


def _plain(value: Any) -> Any:
    """Dataclasses inside a dict or tuple as JSON types."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _ratio(error: tuple[float, ...], output: tuple[float, ...]) -> float:
    return math.sqrt(sum(error) / max(sum(output), 1e-30))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
