"""An audit of a model: what sparse attention keeps and loses in it, layer by layer, and what it saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.config import Budget
from openvsa.errors import OpenVSAError
from openvsa.evaluate.audit_attention import CallFigures, audit_plans
from openvsa.evaluate.audit_budget import Curve, allocate, between
from openvsa.evaluate.audit_config import at_step, check_table, dense_steps, uniform, which_steps
from openvsa.evaluate.audit_figures import CallAudit, DenseCall, ForwardAudit, SparseRun, TimedDensity
from openvsa.evaluate.comparison import PassTime
from openvsa.evaluate.quality import compare_clips
from openvsa.evaluate.recorder import AttentionRecord, AttentionRecorder
from openvsa.integrations.branch import pipeline_has_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import SparseHandle, observe, sparsify
from openvsa.integrations.report import AttentionEvent, LayerReport, SparsityReport
from openvsa.layout import TileLayout
from openvsa.layout.shelf import kept_layout
from openvsa.select import BudgetTable, select_by_head

__all__ = ["CURVE", "LENGTHS", "Audit", "MakeClip", "Measured", "curves_of"]

CURVE = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Densities at which the output error of every head is measured, beside the one asked for and half of it."""

LENGTHS = (1.0, 0.5, 0.25)
"""How far from the uniform budget to an advised one a table is tried."""

TIMES = 3
"""How often a forward is timed at each density."""

MakeClip = Callable[..., Tensor]
"""Makes a clip, uint8 [frames, height, width, 3], from `num_inference_steps` and `callback_on_step_end` (as in
Diffusers), with the same noise in every call."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What an audit found, before it is made into figures. branch: see AuditSettings."""

    layout: TileLayout
    branch: bool
    dense_steps: Mapping[int, str]
    dense_calls: tuple[DenseCall, ...]
    calls: tuple[CallAudit, ...]
    forwards: tuple[ForwardAudit, ...]
    dense: PassTime
    sparse: SparseRun
    dense_forward: float
    times: tuple[TimedDensity, ...]
    table: BudgetTable | None
    budgeted: SparseRun | None
    sparse_clip: Tensor
    attention: AttentionRecord | None


@dataclass(frozen=True, eq=False)
class _Forward:
    """A forward of a transformer that can be run again."""

    step: int
    transformer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        out = self.transformer(*self.args, **self.kwargs)
        return (out[0] if isinstance(out, tuple) else out.sample).float()


class Audit:
    """Audits a model that makes clips.

    One dense generation keeps the inputs of one forward in each audited step (the first of the step, which under
    guidance is one of two). Each is then run again: sparsely, for the picture and the change of the prediction;
    densely, measuring every layer that is sparse on the inputs that dense attention gives it; and for a table sparsely
    but for one head at a time. A sparse generation gives the change of the clip. So the error of a layer is its own,
    and what errors do to each other shows in the prediction and in the clip.

    Weights that were trained with a compressed branch are another model without it: what all is compared with is then
    attention over all tiles with the branch, and attention without it, in one more generation, for times alone.

    Args:
        pipe: a pipeline that `sparsify` supports.
        make_clip: see MakeClip.
        config: the settings to audit. Forwards that are run alone make plans of their own, whatever its reuse_steps.
        steps: denoising steps of a generation.
        audited: the steps to look at, from 0; none that the settings leave dense.
        query_blocks: blocks of queries to look at in a call, evenly spread.
        by: "head" or "layer": for a table, what is made dense at a time; heads take as many forwards as there are heads
            in the model, times the audited steps.
        on_progress: called with what begins and in how many parts; what it returns is called after each part.

    Raises:
        OpenVSAError: an audited step does not exist, or stays dense.
    """

    def __init__(
        self,
        pipe: Any,
        make_clip: MakeClip,
        *,
        config: SparsityConfig,
        steps: int,
        audited: Collection[int],
        query_blocks: int = 64,
        by: str = "head",
        on_progress: Callable[[str, int], Callable[[], None]] = lambda *_: lambda: None,
    ) -> None:
        if by not in ("head", "layer"):
            raise OpenVSAError(f"by must be 'head' or 'layer', got {by!r}")
        self._pipe, self._make_clip, self._by = pipe, make_clip, by
        self._config, self._steps, self._audited = config, steps, which_steps(config, steps, audited)
        self._query_blocks, self._on_progress = query_blocks, on_progress
        self._branch = pipeline_has_branch(pipe)

    def run(self, *, with_table: bool) -> Measured:
        """Everything. `with_table` also makes a budget table and generates with it.

        Raises:
            OpenVSAError: the settings do not fit the model, or leave every layer dense in the audited steps; or as in
                `check_table`.
        """
        if with_table:
            check_table(self._config)
        self._warm_up_sparse()
        forwards: list[_Forward] = []
        moves: dict[int, float] = {}
        dense_clip, dense_latents, dense_time, _ = self._generate("full attention", self._full, forwards, moves)
        if self._branch:
            dense_time = self._generate("without branch", self._observe)[2]
        moved = [moves.get(forward.step, moves.get(forward.step + 1, 1.0)) for forward in forwards]
        recorder = AttentionRecorder([forward.step for forward in forwards], max_heads=4, max_bytes=2 << 20)
        changed, layers = self._sparse_forwards(forwards, recorder)
        predictions, calls, dense_calls, layout = self._measure(forwards, layers)
        errors = [_relative(ours, prediction) for ours, prediction in zip(changed, predictions, strict=True)]
        near = self._config.base.keep_ratio or fmean(share for call in calls for share in call.figures.density)
        dense_forward, times = self._times(forwards[0], near)

        table, gains, with_budget = None, [{} for _ in forwards], [None] * len(forwards)
        if with_table:
            gains = self._gains(forwards, predictions, errors, calls)
            harms = [(error * move) ** 2 for error, move in zip(errors, moved, strict=True)]
            table, with_budget = self._table(forwards, predictions, errors, harms, calls, gains, layout)

        def sparse_run(name: str, config: SparsityConfig, warm_up: bool) -> tuple[SparseRun, Tensor]:
            clip, latents, taken, report = self._generate(
                name, lambda pipe: sparsify(pipe, config=config), warm_up=warm_up
            )
            error, quality = _relative(latents, dense_latents), compare_clips(clip, dense_clip)
            asked, kept = report.requested_density, report.delivered_density
            return SparseRun(report.executed_density, taken, quality, error, asked, kept), clip

        sparse, sparse_clip = sparse_run("sparse attention", self._config, warm_up=False)
        budgeted = None
        if table:
            budgeted = sparse_run("with the table", replace(self._config, layers=table.layers), warm_up=True)[0]
        return Measured(
            layout,
            self._branch,
            dense_steps(self._config, self._steps),
            tuple(dense_calls),
            tuple(calls),
            tuple(
                ForwardAudit(forward.step, error, move, only, ours)
                for forward, error, move, only, ours in zip(forwards, errors, moved, gains, with_budget, strict=True)
            ),
            dense_time,
            sparse,
            dense_forward,
            times,
            table,
            budgeted,
            sparse_clip,
            recorder.record(),
        )

    # -- generations --------------------------------------------------------------------------------------------

    def _full(self, pipe: Any) -> SparseHandle:
        """What sparse attention is compared with."""
        return sparsify(pipe, config=uniform(self._config, 1.0)) if self._branch else self._observe(pipe)

    def _observe(self, pipe: Any) -> SparseHandle:
        return observe(pipe, tile=self._config.tile)

    def _warm_up(self, attach: Callable[[Any], SparseHandle]) -> SparsityReport:
        """A short untimed generation, because the first use of every kernel and buffer is slower than the rest. It has
        two steps, as the schedule of Mochi cannot have one."""
        with attach(self._pipe) as handle:
            self._make_clip(
                num_inference_steps=min(2, self._steps), callback_on_step_end=lambda _, __, ___, tensors: tensors
            )
            return handle.report()

    def _warm_up_sparse(self) -> None:
        """Comes before all other work, so that settings that cannot run are refused at once."""
        # What is sparse, at the density of most steps: the first ones may be dense.
        config = replace(self._config, steps={}, dense_first_steps=0, dense_last_steps=0)
        done = self._on_progress("warm-up", 1)
        layers = self._warm_up(lambda pipe: sparsify(pipe, config=config)).layers
        done()
        # Whether a step with a density of its own is sparse, only a forward in it can tell.
        if layers and not self._config.steps and not any(layer.sparse_calls for layer in layers):
            raise _nothing_sparse(layers[0].name, layers[0].why_dense)

    def _generate(
        self,
        name: str,
        attach: Callable[[Any], SparseHandle],
        forwards: list[_Forward] | None = None,
        moves: dict[int, float] | None = None,
        warm_up: bool = True,
    ) -> tuple[Tensor, Tensor, PassTime, SparsityReport]:
        """A clip, its final latents, its time and what attention did; keeps the audited forwards if asked to, and how
        far the latents move in each step but the first, before which they are not told."""
        done = self._on_progress(name, self._steps)
        last: dict[str, Any] = {"step": 0, "latents": None}

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            before, now = last["latents"], tensors["latents"]
            if moves is not None and before is not None:
                moves[step] = float((now.float() - before.float()).norm())
            last["step"], last["latents"] = step + 1, now.detach().clone()
            done()
            return tensors

        if warm_up:
            self._warm_up(attach)
        with attach(self._pipe) as handle, self._keep(forwards, last):
            begin = time.perf_counter()
            clip = self._make_clip(num_inference_steps=self._steps, callback_on_step_end=on_step_end)
            seconds = time.perf_counter() - begin
            report = handle.report()
        if last["latents"] is None:
            raise OpenVSAError(f"{type(self._pipe).__name__} did not call callback_on_step_end, which an audit needs")
        taken = PassTime(seconds, report.attention_seconds)
        return clip, last["latents"].float(), taken, report

    @contextmanager
    def _keep(self, forwards: list[_Forward] | None, last: dict[str, Any]) -> Iterator[None]:
        """Keep the inputs of the first forward of every audited step."""
        if forwards is None:
            yield
            return
        kept: set[int] = set()

        def keep(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step = last["step"]
            if step in self._audited and step not in kept:
                kept.add(step)
                forwards.append(_Forward(step, transformer, _copied(args), _copied(kwargs)))

        hooks = [
            getattr(self._pipe, name).register_forward_pre_hook(keep, with_kwargs=True)
            for name in ("transformer", "transformer_2")
            if getattr(self._pipe, name, None) is not None
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # -- forwards -----------------------------------------------------------------------------------------------

    def _sparse_forwards(
        self, forwards: Sequence[_Forward], recorder: AttentionRecorder
    ) -> tuple[list[Tensor], list[tuple[LayerReport, ...]]]:
        """The sparse prediction of every forward, and what its layers did."""
        predictions: list[Tensor] = []
        layers: list[tuple[LayerReport, ...]] = []
        done = self._on_progress("sparse forwards", len(forwards))
        for forward in forwards:
            with sparsify(self._pipe, config=at_step(self._config, forward.step)) as handle:
                # A forward that is run alone takes its step for the first one.
                handle.on_attention(lambda event, step=forward.step: recorder(replace(event, step=step)))
                predictions.append(forward())
                layers.append(handle.report().layers)
            done()
        return predictions, layers

    def _measure(
        self, forwards: Sequence[_Forward], layers: Sequence[tuple[LayerReport, ...]]
    ) -> tuple[list[Tensor], list[CallAudit], list[DenseCall], TileLayout]:
        """The dense prediction of every forward, and every layer in it."""
        predictions: list[Tensor] = []
        calls: list[CallAudit] = []
        dense: list[DenseCall] = []
        layouts: set[TileLayout] = set()
        done = self._on_progress("layers", sum(map(len, layers)))
        for forward, there in zip(forwards, layers, strict=True):
            seen: set[int] = set()
            why = {layer.layer: layer.why_dense for layer in there if not layer.sparse_calls}

            def look(
                event: AttentionEvent, step: int = forward.step, seen: set[int] = seen, why: Mapping[int, str] = why
            ) -> None:
                if event.layer in seen:  # a further sample, where samples differ in their text
                    return
                seen.add(event.layer)
                done()
                if event.layer in why:
                    # The forward that was run alone took its step for the first one.
                    said = self._config.at(event.name, step, self._steps, event.layout.num_tokens)
                    reason = said if isinstance(said, str) else why[event.layer]
                    dense.append(DenseCall(step, event.layer, event.name, reason))
                    return
                layout, figures = self._look_at(event, at_step(self._config, step))
                layouts.add(layout)
                calls.append(CallAudit(step, event.timestep, event.layer, event.name, figures))

            with self._full(self._pipe) as handle:
                handle.on_attention(look)
                predictions.append(forward())
        if dense and not calls:
            raise _nothing_sparse(dense[0].name, dense[0].why)
        if not layouts:
            raise OpenVSAError(f"no self-attention of {type(self._pipe).__name__} could be looked at")
        if len(layouts) != 1:
            raise OpenVSAError(f"an audit is of one lattice, got {len(layouts)}: {sorted(map(str, layouts))}")
        return predictions, calls, dense, layouts.pop()

    def _look_at(self, event: AttentionEvent, config: SparsityConfig) -> tuple[TileLayout, CallFigures]:
        """What the settings of a step do in one call, and the layout that they do it in."""
        shown, q, k, v = event.layout, event.q[:1], event.k[:1], event.v[:1]
        layout = kept_layout(shown.grid, config.tile, config.q_tiles, shown.prefix, shown.suffix, q.device)
        if layout != shown:  # tiles that choose together are neighbours in block order
            q, k, v = (layout.permute(shown.unpermute(x)) for x in (q, k, v))
        budget = config.at(event.name, 0, None, layout.num_tokens)
        assert not isinstance(budget, str), budget
        budgets = budget if isinstance(budget, tuple) else (budget,) * q.shape[2]
        plan = select_by_head(config.selector, q, k, layout, budgets)
        share = config.base.keep_ratio
        curve = {}
        for density in sorted({*CURVE, share / 2, share} if share else CURVE):
            there = uniform(config, density)
            curve[density] = there.selector(q, k, layout, there.base)
        return layout, audit_plans(q, k, v, layout, plan, curve, max_rows=self._query_blocks)

    def _times(self, forward: _Forward, near: float) -> tuple[float, tuple[TimedDensity, ...]]:
        """Attention seconds of one forward: dense, and with all layers sparse at densities near this one and up to 1.
        The least of TIMES, taken in turns: what else the machine does can only add to them."""
        shares = sorted({near / 2, near, min(1.0, 2 * near), 1.0})
        done = self._on_progress("times", TIMES * (1 + len(shares)))
        dense, times = math.inf, dict.fromkeys(shares, TimedDensity(1.0, math.inf))
        for _ in range(TIMES):
            with self._observe(self._pipe) as handle:
                forward()
                dense = min(dense, handle.report().attention_seconds)
            done()
            for share in shares:
                with sparsify(self._pipe, config=uniform(self._config, share)) as handle:
                    forward()
                    report = handle.report()
                found = TimedDensity(report.executed_density, report.attention_seconds)
                times[share] = min(times[share], found, key=lambda one: one.seconds)
                done()
        return dense, tuple(times.values())

    # -- the table ----------------------------------------------------------------------------------------------

    def _gains(
        self,
        forwards: Sequence[_Forward],
        predictions: Sequence[Tensor],
        errors: Sequence[float],
        calls: Sequence[CallAudit],
    ) -> list[dict[str, tuple[float, ...]]]:
        """For every forward: see ForwardAudit.gains."""
        heads, density = {call.name: len(call.figures.output) for call in calls}, self._density
        units = [
            [(call.name, head) for call in calls if call.step == forward.step for head in self._units(heads[call.name])]
            for forward in forwards
        ]
        done = self._on_progress("heads" if self._by == "head" else "layers one by one", sum(map(len, units)))
        found: list[dict[str, tuple[float, ...]]] = []
        for forward, prediction, error, here in zip(forwards, predictions, errors, units, strict=True):
            gains: dict[str, tuple[float, ...]] = {}
            for name, head in here:
                shares = {other: (density,) * count for other, count in heads.items()}
                shares[name] = tuple(1.0 if head in (None, at) else density for at in range(heads[name]))
                with self._with_layers(shares):
                    without = _relative(forward(), prediction)
                gains[name] = (*gains.get(name, ()), 1 - (without / max(error, 1e-30)) ** 2)
                done()
            found.append(gains)
        return found

    @property
    def _density(self) -> float:
        """That of the table, whose settings have one."""
        assert self._config.base.keep_ratio is not None
        return self._config.base.keep_ratio

    def _with_layers(self, layers: Mapping[str, tuple[float, ...]]) -> SparseHandle:
        return sparsify(self._pipe, config=replace(self._config, layers=layers))

    def _units(self, heads: int) -> Sequence[int | None]:
        return range(heads) if self._by == "head" else (None,)

    def _table(
        self,
        forwards: Sequence[_Forward],
        predictions: Sequence[Tensor],
        errors: Sequence[float],
        harms: Sequence[float],
        calls: Sequence[CallAudit],
        gains: Sequence[dict[str, tuple[float, ...]]],
        layout: TileLayout,
    ) -> tuple[BudgetTable, list[float]]:
        """The table, and the change of every prediction with it. `harms` weigh the forwards, see `curves_of`.

        What the curves advise holds near the uniform budget only, so the way there is tried at full, half and quarter
        length on the audited forwards; where none of them is better than uniform, the table is uniform. Where there are
        two transformers, each spends its own: they serve different numbers of steps, so that what one saves does not
        pay for the other.
        """
        by_step = {forward.step: gain for forward, gain in zip(forwards, gains, strict=True)}
        num_tiles = layout.num_tiles
        weights = {forward.step: harm for forward, harm in zip(forwards, harms, strict=True)}
        uniform_share = Budget(keep_ratio=self._density).blocks(num_tiles) / num_tiles
        spent: list[tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]] = []  # uniform, and as advised
        for transformer in {id(forward.transformer): forward.transformer for forward in forwards}.values():
            its = {forward.step for forward in forwards if forward.transformer is transformer}
            curves = curves_of([call for call in calls if call.step in its], by_step, weights, self._density, num_tiles)
            uniform = {name: (uniform_share,) * len(heads) for name, heads in curves.items()}
            spent.append((uniform, allocate(curves, self._density, num_tiles)))

        def table_at(length: float) -> BudgetTable:
            parts = [between(uniform, advised, length, num_tiles) for uniform, advised in spent]
            layers = {name: heads for part in parts for name, heads in part.items()}
            return BudgetTable(self._density, layers, layout.tile)

        def harm_of(found: Sequence[float]) -> float:
            shares = [(ours / max(error, 1e-30)) ** 2 for ours, error in zip(found, errors, strict=True)]
            return sum(harm * share for harm, share in zip(harms, shares, strict=True))

        best = table_at(0.0), list(errors)
        done = self._on_progress("the table", len(LENGTHS))
        for length in LENGTHS:
            table = table_at(length)
            with self._with_layers(table.layers):
                found = [_relative(f(), p) for f, p in zip(forwards, predictions, strict=True)]
            if harm_of(found) < harm_of(best[1]):
                best = table, found
            done()
        return best


def curves_of(
    calls: Sequence[CallAudit],
    gains: Mapping[int, Mapping[str, tuple[float, ...]]],
    weights: Mapping[int, float],
    density: float,
    num_tiles: int,
) -> dict[str, list[Curve]]:
    """Layer -> for each head, the share of the squared change of the model's prediction that it causes at each density.

    At the density asked for, that is what vanishes when the head is made dense while all others stay sparse (`gains`,
    step -> layer -> heads; if measured for a layer only, split as its output error is). At other densities it grows
    and shrinks as the squared error of the head's output does. Steps count by `weights` (step -> weight): the squared
    change of the prediction times the squared way that the latents go in the step, which is what the error does to
    them. A head whose loss does no harm has nothing to gain. A curve begins at half the density asked for: further
    away the measurement says little.

    A layer's change of the prediction with all others dense would be a poor measure: a model that was trained sparsely
    mends in later layers much of what the first ones lose.
    """
    kept = sorted({_blocks(p.asked, num_tiles) for p in calls[0].figures.curve if density / 2 <= p.asked < 1})
    sums: dict[str, list[list[float]]] = {}
    for call in calls:
        figures, gain = call.figures, gains[call.step][call.name]
        if len(gain) == 1:
            whole = max(sum(figures.error), 1e-30)
            gain = tuple(gain[0] * error / whole for error in figures.error)
        points = {_blocks(point.asked, num_tiles): point.error for point in figures.curve}
        heads = sums.setdefault(call.name, [[0.0] * len(kept) for _ in figures.output])
        for head, losses in enumerate(heads):
            for at, blocks in enumerate(kept):
                losses[at] += weights[call.step] * gain[head] * points[blocks][head] / max(figures.error[head], 1e-30)
    total = max(sum(weights[step] for step in {call.step for call in calls}), 1e-30)

    def curve(losses: list[float]) -> Curve:
        points = [
            (n / num_tiles, max(0.0, loss / total)) for n, loss in zip(kept, losses, strict=True) if n < num_tiles
        ]
        return Curve((*points, (1.0, 0.0)))

    return {name: [curve(losses) for losses in heads] for name, heads in sums.items()}


def _nothing_sparse(name: str, why: str) -> OpenVSAError:
    return OpenVSAError(
        f"every layer stays dense in the steps looked at, such as {name} ({why}), so that there is nothing to audit; "
        "change the settings"
    )


def _blocks(share: float, num_tiles: int) -> int:
    return Budget(keep_ratio=share).blocks(num_tiles)


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def _copied(value: Any) -> Any:
    """The same with copies of the tensors in it, which a pipeline may write into later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(one) for one in value)
    return value
