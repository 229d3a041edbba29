"""One denoising step of a whole model: gate, times of attention alone and of the step, memory, and where time goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo

from openvsa.bench.model_cases import SMALL_GRID, ModelCase
from openvsa.bench.model_dense import DenseBy, dense_kernels
from openvsa.bench.model_profile import kernel_times
from openvsa.bench.record import MODEL_SCHEMA, new_record, result_path, write
from openvsa.bench.timing import Timing, gpu_clocks, measure, summary, time_interleaved
from openvsa.errors import OpenVSAError
from openvsa.integrations.branch import LearnedBranch, add_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import observe, sparsify
from openvsa.integrations.families import family_of
from openvsa.integrations.report import AttentionEvent
from openvsa.layout import TileLayout
from openvsa.ops import block_sparse_attention
from openvsa.select import ReleasedVSA

__all__ = ["DENSITIES", "MODES", "ModelOptions", "by_density", "measure_model", "one_step", "run_models"]

DENSITIES = (0.25, 0.125, 0.1)
MODES = ("eager", "compiled")
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 10
_HOST_ROUNDS = 5
_HELD = 2**28  # bytes; workspaces that stay are less

Say = Callable[[str], None]


def by_density(densities: Iterable[float]) -> dict[str, SparsityConfig]:
    """Settings that are as by default but for the density, by the names of their rows."""
    return {f"density {density:g}": SparsityConfig(density=density, min_tokens=0) for density in densities}


def one_step(config: SparsityConfig) -> SparsityConfig:
    """What of the settings holds in a single step that is sparse and chooses its tiles anew."""
    return replace(config, steps={}, dense_first_steps=0, dense_last_steps=0, reuse_steps=1)


@dataclass(frozen=True)
class ModelOptions:
    """What of a model is measured.

    sparse: settings of the sparse steps, besides dense, by the names of their rows. They differ in their budget alone.
    config: the preset or file that the settings are from, for the record; None for those of `by_density` alone.
    modes: "eager", "compiled" (the repeated blocks) or both.
    profile: also which kernels the time of the dense and the last sparse step goes to.
    case_seconds: how long the timed rounds of one mode may take (there are at least three).
    """

    sparse: Mapping[str, SparsityConfig] = field(default_factory=lambda: by_density(DENSITIES))
    config: str | None = None
    modes: tuple[str, ...] = ("eager",)
    profile: bool = False
    case_seconds: float = 4.0

    def __post_init__(self) -> None:
        if not self.modes or not set(self.modes) <= set(MODES):
            raise OpenVSAError(f"modes are {' and '.join(MODES)}, got {', '.join(self.modes) or 'none'}")

    @property
    def released(self) -> bool:
        """Whether the settings are those of weights that were trained with VSA, whose models have a branch."""
        return any(isinstance(config.selector, ReleasedVSA) for config in self.sparse.values())

    def check(self, case: ModelCase) -> None:
        """Refuse what the case cannot be measured with.

        Raises:
            OpenVSAError: tiles have another number of axes than the lattice, or the model cannot have a branch.
        """
        for config in self.sparse.values():
            for name, sizes in (("tile", config.tile), ("q_tiles", config.q_tiles)):
                if sizes and len(sizes) != len(case.grid):
                    got, grid = ("x".join(map(str, some)) for some in (sizes, case.grid))
                    raise OpenVSAError(f"{name} must have an entry for each axis of {case.name} ({grid}), got {got}")
        if self.released and case.transformer != "WanTransformer3DModel":
            raise OpenVSAError(
                f"{self.config} is for weights of a WanTransformer3DModel that were trained with VSA; {case.name} is a "
                f"{case.transformer}"
            )

    def describe(self) -> dict[str, Any]:
        """For a result file."""
        sparse = {name: config.to_dict() for name, config in self.sparse.items()}
        return {
            "sparse": sparse, "config": self.config, "modes": self.modes, "profile": self.profile,
            "case_seconds": self.case_seconds,
        }  # fmt: skip


def run_models(
    cases: Sequence[ModelCase],
    device: torch.device,
    options: ModelOptions,
    *,
    out: Path | None,
    command: str,
    commit: str | None,
    seconds: float | None = None,
    say: Say = lambda text: None,
    on_case: Callable[[dict[str, Any]], None] = lambda found: None,
) -> tuple[dict[str, Any], Path | None]:
    """Measure models one after the other; the record, written after each, and the path of its file (None without a
    folder `out`). No further case is started after `seconds`; the record lists what was not run.

    Raises:
        OpenVSAError: a case cannot be measured with these settings.
    """
    for case in cases:
        options.check(case)
    begin = time.perf_counter()
    record = new_record(device, command, commit, {**options.describe(), "seconds": seconds}, MODEL_SCHEMA)
    path = result_path(out, record) if out is not None else None
    record["not_run"] = [case.name for case in cases]
    for case in cases:
        if seconds is not None and time.perf_counter() - begin > seconds:
            break
        try:
            found = measure_model(case, device, options, lambda text, case=case: say(f"{case.name}: {text}"))
        except torch.OutOfMemoryError as error:  # the next model may be smaller
            found = {"name": case.name, "failed": [" ".join(str(error).split())[:400]], "rows": [], "passed": False}
        record["cases"].append(found)
        record["not_run"].remove(case.name)
        record["seconds"] = round(time.perf_counter() - begin, 1)
        if path is not None:
            write(path, record)
        on_case(found)
        torch.compiler.reset()
        gc.collect()  # modules and what was compiled of them hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if path is not None:
        write(path, record)
    return record, path


def measure_model(case: ModelCase, device: torch.device, options: ModelOptions, say: Say) -> dict[str, Any]:
    """The results of one model. Nothing is timed unless it passes the gate."""
    begin = time.perf_counter()
    stages: list[tuple[str, float]] = []

    def stage(text: str) -> None:
        stages.append((text, time.perf_counter()))
        say(text)

    held = _held_bytes(device)
    stage("random weights")
    model = case.build(device)
    subject = _Subject(case, model, device, options, alone=held <= _HELD)
    result: dict[str, Any] = {"name": case.name, **case.describe(model), "failed": [], "rows": []}
    stage("attention alone")
    result["layers"], result["attention"] = _measure_attention(subject, options, result["rows"])
    result["left_out"] = [{"what": f"dense-{name}", "reasons": why} for name, why in subject.without.items()]
    if not subject.alone:
        reasons = [f"{held / 2**30:.1f} GiB were in use before the model was made, and would count"]
        result["left_out"].append({"what": "peak memory", "reasons": reasons})
    stage("gate")
    result["gate"], reference = _gate(subject, result["failed"])
    if not result["failed"]:
        result["clocks"] = {"before": gpu_clocks(device)}
        if "eager" in options.modes:
            if device.type == "cuda":
                stage("host")
                _measure_host(subject, result["rows"])
            _measure_steps(subject, "eager", options, result, reference, stage)
        if "compiled" in options.modes:
            _compile_blocks(model)
            with _graphs_for(subject, result["layers"]):
                _measure_steps(subject, "compiled", options, result, reference, stage)
        result["clocks"]["after"] = gpu_clocks(device)
    _add_ratios(result["rows"])
    ends = [*(start for _, start in stages[1:]), time.perf_counter()]
    result["stages"] = [[text, round(end - start, 2)] for (text, start), end in zip(stages, ends, strict=True)]
    return {**result, "passed": not result["failed"], "seconds": round(time.perf_counter() - begin, 1)}


class _Subject:
    """A model, what it is called with, and the ways in which its attention is computed."""

    def __init__(self, case: ModelCase, model: Any, device: torch.device, options: ModelOptions, alone: bool) -> None:
        self.case, self.model, self.device, self.alone = case, model, device, alone
        self.sparse = options.sparse
        self.densities: dict[str, float] = {}
        if options.released:
            add_branch(model)  # its weights are zero: the model computes what it did, in the time that any others take
        self.inputs = case.arguments(model, device)
        self.kernels, self.without = dense_kernels(device.type)
        self.dense = next(iter(self.kernels))

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any] | None = None) -> Tensor:
        return self.model(**(inputs or self.inputs), return_dict=False)[0]

    @torch.no_grad()
    def leave_out_what_fails(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep the dense kernels that run on q, k and v [B, H, S, D]: some compile when they are first called, and one
        that can be imported may not be for this device. Two must be left, for the gate."""
        for name, attend in list(self.kernels.items()):
            try:
                attend(q, k, v)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise anything
                if len(self.kernels) <= 2:
                    raise
                del self.kernels[name]
                said = " ".join(str(error).split())[:200]
                self.without[name] = (f"fails in its first call ({type(error).__name__}: {said})",)
        self.dense = next(iter(self.kernels))

    def by(self, config: SparsityConfig | None, kernel: str | None = None) -> AbstractContextManager[Any]:
        """Inside, attention is sparse or, with None, computed by a dense kernel, the chosen one by default."""
        if config is None:
            return DenseBy(self.kernels[kernel or self.dense])
        return sparsify(self.model, config=config, measure=False)

    def ways(self) -> dict[str, SparsityConfig | None]:
        """What is timed, by name, dense first."""
        return {f"dense-{self.dense}": None, **self.sparse}


def _measure_attention(subject: _Subject, options: ModelOptions, rows: list[dict[str, Any]]) -> tuple[int, Any]:
    """Time one layer's attention by itself, on the queries, keys and values that the model gives it, and choose the
    fastest dense kernel. Returns the number of layers, and what the layer looks like."""
    events: list[AttentionEvent] = []
    names: list[str] = []

    def keep(event: AttentionEvent) -> None:
        names.append(event.name)
        if not events:
            events.append(event)

    with subject.by(None), observe(subject.model) as handle:
        handle.on_attention(keep)
        subject.forward()
    [event] = events
    seen, first = event.layout, next(iter(subject.sparse.values()))
    layout = TileLayout(seen.grid, first.tile or seen.tile, seen.prefix, seen.suffix, first.q_tiles)
    family = family_of(subject.model)
    hoisted = family.hoist(subject.model) is not None
    branch = LearnedBranch.of([attn for _, attn in family.attentions(subject.model)])
    raster = [seen.unpermute(x) for x in (event.q, event.k, event.v)]
    blocked = [layout.permute(x) for x in raster]
    q, k, v = blocked if hoisted else raster
    weight = torch.zeros_like(q)
    subject.leave_out_what_fails(*(x.transpose(1, 2) for x in (q, k, v)))

    def sparse(config: SparsityConfig) -> Tensor:
        mine = [x if hoisted else layout.permute(x) for x in (q, k, v)]
        if branch is not None:
            out, _ = branch.attend(
                mine[0], mine[1], mine[2], weight, layout, config.base, config.selector, scale=None,
                backend=config.backend,
            )  # fmt: skip
        else:
            plan = config.selector(mine[0], mine[1], layout, config.base)
            out = block_sparse_attention(mine[0], mine[1], mine[2], plan, backend=config.backend)
        return out if hoisted else layout.unpermute(out)

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, attend in subject.kernels.items():
        calls["attention", f"dense-{name}"] = partial(attend, *(x.transpose(1, 2) for x in (q, k, v)))
    with torch.no_grad():
        for name, config in subject.sparse.items():
            plan = config.selector(blocked[0], blocked[1], layout, config.base)
            asked = config.base.keep_ratio
            subject.densities[name] = plan.density if asked is None else asked
            calls["attention", name] = partial(sparse, config)
            calls["kernel", name] = partial(block_sparse_attention, *blocked, plan, backend=config.backend)
        for call in calls.values():
            call()
        times = time_interleaved(calls, subject.device, options.case_seconds / 4)
    rows += [_row(mode, name, subject.densities.get(name), timing) for (mode, name), timing in times.items()]
    subject.dense = min(subject.kernels, key=lambda name: times["attention", f"dense-{name}"].ms)
    about = {
        "layer": event.name, "tokens": q.shape[1], "heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3],
        "tile": layout.tile, "q_tiles": layout.q_tiles, "blocks": layout.num_blocks, "tiles": layout.num_tiles,
        "text_tokens": layout.prefix + layout.suffix, "hoisted": hoisted, "dense": subject.dense,
    }  # fmt: skip
    return len(names), about


def _gate(subject: _Subject, failed: list[str]) -> tuple[dict[str, float], Tensor]:
    """Whether the model computes the same with full plans as densely, to rounding; whether sparse steps are finite
    numbers; and whether the model is what it was afterwards, bit for bit. Returns the changes and the dense output."""
    with subject.by(None):
        dense = subject.forward()
    other = next(name for name in subject.kernels if name != subject.dense)
    with subject.by(None, other):
        rounding = _change(subject.forward(), dense)
    found = {f"dense-{other}": rounding}
    allowed = 2 * rounding + torch.finfo(subject.case.dtype).eps
    if not dense.isfinite().all() or not dense.float().std() > 0:
        failed.append("the dense model gives no finite, varying numbers with these random weights")
    full = {"density 1": _keeping_all(next(iter(subject.sparse.values())))}
    name, change = "", 0.0
    for name, config in (full | dict(subject.sparse)).items():
        with subject.by(config):
            out = subject.forward()
        found[name] = change = _change(out, dense)
        if not out.isfinite().all():
            failed.append(f"with {name} the output has numbers that are not finite")
        if name in full and not change <= allowed:
            failed.append(
                f"at density 1 the output differs from that of dense-{subject.dense} by {change:.2e} of its norm; two "
                f"dense kernels differ by {rounding:.2e}, and {allowed:.2e} is allowed"
            )
    if not change > 0:
        failed.append(f"{name} changes nothing: attention has no influence with these random weights")
    with subject.by(None):
        if not torch.equal(subject.forward(), dense):
            failed.append("after sparse steps and detach the dense output is not the same bit for bit")
    return found, dense


def _keeping_all(config: SparsityConfig) -> SparsityConfig:
    """The settings with plans that leave nothing out."""
    if isinstance(config.selector, ReleasedVSA):
        method = replace(config.selector, sparsity=0.0)
        return replace(config, selector=method, budget=method.budget)
    return replace(config, density=1.0, budget=None, layers={}, dense_layers=())


def _change(out: Tensor, of: Tensor) -> float:
    """The norm of the difference as a share of the norm of `of`."""
    return float((out.float() - of.float()).norm() / of.float().norm())


def _compile_blocks(model: Any) -> None:
    """One by one: those that Diffusers names, which are one graph each, or else those that hold the self-attentions."""
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return
    for name in dict.fromkeys(name.rpartition(".")[0] for name, _ in family_of(model).attentions(model)):
        model.get_submodule(name).compile(dynamic=False)


def _graphs_for(subject: _Subject, layers: int) -> AbstractContextManager[None]:
    """Inside, each layer may have a graph of its own for each way. Past its limit, of 8 graphs by default, Dynamo would
    run blocks eagerly, and say nothing unless they must be one graph."""
    limit = len(subject.ways()) * (layers + 1)
    return dynamo.patch(
        recompile_limit=limit, accumulated_recompile_limit=max(limit, dynamo.accumulated_recompile_limit),
        fail_on_recompile_limit_hit=True,
    )  # fmt: skip


def _measure_host(subject: _Subject, rows: list[dict[str, Any]]) -> None:
    """How long the host is busy with a step: a step over a lattice so small that it waits for nothing else. Dense is
    the model as it is, without the mode that chooses a kernel, which takes the host time in every function."""
    inputs = subject.case.arguments(subject.model, subject.device, SMALL_GRID[-len(subject.case.grid) :])
    for name, config in subject.ways().items():
        found = []
        with nullcontext() if config is None else subject.by(config):
            subject.forward(inputs)
            for _ in range(_HOST_ROUNDS):
                torch.cuda.synchronize(subject.device)
                begin = time.perf_counter()
                subject.forward(inputs)
                torch.cuda.synchronize(subject.device)
                milliseconds = (time.perf_counter() - begin) * 1e3
                found.append((milliseconds, milliseconds))
        rows.append(_row("host", name, subject.densities.get(name), summary(found)))


def _measure_steps(
    subject: _Subject, mode: str, options: ModelOptions, result: dict[str, Any], reference: Tensor, say: Say
) -> None:
    """Times of a step in each way, interleaved, after a first one that compiles what must be, tells the memory, and
    must be about as far from the dense `reference`, or from the compiled dense one, as in the gate."""
    peaks, first = {}, {}
    for name, config in subject.ways().items():
        say(f"first step, {mode}, {name}")
        begin = time.perf_counter()
        with subject.by(config):
            if mode == "compiled":
                subject.forward()  # compiles, which takes memory as well
            out, peaks[name] = _run_and_peak(subject)
            first[name] = time.perf_counter() - begin
        change, gate = _change(out, reference), result["gate"]
        rounding = next(share for kernel, share in gate.items() if kernel.startswith("dense-"))
        eps = torch.finfo(subject.case.dtype).eps
        allowed = 2 * (rounding + gate.get(name, 0.0)) + eps
        if mode == "compiled" and config is None:
            # It rounds elsewhere in each layer, and such errors add up as a random walk does. What is sparse has its
            # layers compiled alike, so that this is what it is compared with.
            allowed = 2 * rounding + eps * max(1.0, result["layers"] ** 0.5 / 2)
            gate[f"compiled {name}"] = change
            reference = out
        if not change <= allowed:  # also if it is no number
            result["failed"].append(
                f"{mode}, {name}: the output differs from dense by {change:.2e} of its norm; {allowed:.2e} is allowed"
            )
            return
        del out
    say(f"timing, {mode}")
    # Little of a head start for the host: where it is slower than the device, a step takes as long as it does.
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
    begin, rounds = time.perf_counter(), 0
    while rounds < _FEWEST_ROUNDS or (
        rounds < _MOST_ROUNDS and (time.perf_counter() - begin) * (rounds + 1) / rounds < options.case_seconds
    ):
        for name, config in subject.ways().items():
            with subject.by(config):
                times[name].append(measure(subject.forward, subject.device, 0.0))
        rounds += 1
    for name in subject.ways():
        row = _row(mode, name, subject.densities.get(name), summary(times[name]))
        peak = peaks[name] if subject.alone else None
        result["rows"].append({**row, "peak_bytes": peak, "first_seconds": round(first[name], 2)})
    if options.profile:
        say(f"profile, {mode}")
        ways = list(subject.ways().items())
        for name, config in (ways[0], ways[-1]):
            with subject.by(config):
                found = kernel_times(subject.forward, subject.device)
            result.setdefault("profile", []).append({"mode": mode, "variant": name, **found})


def _run_and_peak(subject: _Subject) -> tuple[Tensor, int | None]:
    """The output of a step, and the most memory in use during it, weights and inputs included; None on a CPU."""
    if subject.device.type != "cuda":
        return subject.forward(), None
    torch.cuda.synchronize(subject.device)
    torch.cuda.reset_peak_memory_stats(subject.device)
    out = subject.forward()
    torch.cuda.synchronize(subject.device)
    return out, torch.cuda.max_memory_allocated(subject.device)


def _held_bytes(device: torch.device) -> int:
    """In use now, by tensors of this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _row(mode: str, name: str, density: float | None, timing: Timing) -> dict[str, Any]:
    """mode: "attention" (one layer's, selection included), "kernel" (one layer's sparse kernel alone), "host", and of
    whole steps "eager" and "compiled". The density is that asked for, or if no share was asked for, of the layer that
    was timed alone; None is dense."""
    return {"mode": mode, "variant": name, "density": density, **asdict(timing)}


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """`faster`: how many times less time than the fastest dense one of the same mode."""
    for mode in dict.fromkeys(row["mode"] for row in rows):
        dense = [row["ms"] for row in rows if row["mode"] == mode and row["density"] is None]
        for row in rows:
            if row["mode"] == mode:
                row["faster"] = min(dense) / row["ms"] if dense else None
