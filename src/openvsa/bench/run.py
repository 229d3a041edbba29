"""One run: gate, memory, interleaved timing, and a record that is written after every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvsa.bench import gate, gate_timed
from openvsa.bench.cases import Case, share_name
from openvsa.bench.contenders import Attend, Contender
from openvsa.bench.oracle import Inputs
from openvsa.bench.plans import make_plan, shared_with_next, smooth_queries_and_keys
from openvsa.bench.record import new_record, result_path, write
from openvsa.bench.timing import Timing, gpu_clocks, peak_bytes, time_interleaved
from openvsa.config import Budget
from openvsa.nn.functional import video_sparse_attention
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.registry import backends
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK

__all__ = ["PASSES", "measure_case", "run"]

# Products of a token pair per head: q·k and p·v forward; those of the exact backward are 2.5 times as many.
FLOP_PER_PAIR = 4
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Entry:
    """Something to time: `attend` on tensors in the order that it likes, whose results are worth `pairs` token pairs.
    `plan` names the plan, "-" for dense; `block_plan` is what the oracle needs to check it, `budget` what the whole op
    selects with. `plan_bytes` counts the lists that the caller holds."""

    op: str
    contender: Contender
    plan: str
    attend: Attend
    tensors: tuple[Tensor, ...]
    grad: Tensor
    block_plan: BlockPlan
    pairs: int
    needs_grad: bool
    plan_bytes: int = 0
    budget: Budget | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.contender.name, self.plan

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.attend(*tensors)

    def both(self) -> None:
        leaves = [x.detach().requires_grad_() for x in self.tensors]
        torch.autograd.grad(self.run(leaves), leaves, self.grad)

    def calls(self) -> dict[str, Callable[[], object]]:
        """By pass. The graph that "backward" walks is built once."""
        found: dict[str, Callable[[], object]] = {"forward": partial(self.run, self.tensors)}
        if self.needs_grad:
            leaves = [x.detach().requires_grad_() for x in self.tensors]
            out = self.run(leaves)
            found["backward"] = lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True)
            found["both"] = self.both
        return found

    @property
    def input_bytes(self) -> int:
        return self.plan_bytes + sum(x.numel() * x.element_size() for x in (*self.tensors, self.grad))


def run(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    out: Path | None,
    command: str,
    commit: str | None,
    seconds: float | None = None,
    case_seconds: float = 3.0,
    say: Say = lambda text: None,
    on_case: Callable[[dict[str, Any]], None] = lambda found: None,
) -> tuple[dict[str, Any], Path | None]:
    """Measure cases one after the other; the record and the path of its file (None without a folder `out`).

    Args:
        seconds: start no further case after this long; the record lists what was not run.
        case_seconds: how long the timed rounds of one case may take (there are at least three).
        say: called with what is happening now.
        on_case: called with the results of each case.
    """
    begin = time.perf_counter()
    settings = {"contenders": [c.name for c in contenders], "seconds": seconds, "case_seconds": case_seconds}
    record = new_record(device, command, commit, settings)
    path = result_path(out, record) if out is not None else None
    record["not_run"] = [case.name for case in cases]
    for case in cases:
        if seconds is not None and time.perf_counter() - begin > seconds:
            break
        try:
            found = measure_case(
                case, contenders, device, case_seconds, lambda text, case=case: say(f"{case.name}: {text}")
            )
        except torch.OutOfMemoryError as error:  # the next case may be smaller
            found = _nothing_of(case) | {"failed": [{"contender": "all", "why": _words(error)}], "passed": False}
        record["cases"].append(found)
        record["not_run"].remove(case.name)
        record["seconds"] = round(time.perf_counter() - begin, 1)
        if path is not None:
            write(path, record)
        on_case(found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if path is not None:
        write(path, record)
    return record, path


def measure_case(
    case: Case, contenders: Sequence[Contender], device: torch.device, case_seconds: float, say: Say
) -> dict[str, Any]:
    """The results of one case. Nothing is timed unless every backend of this package passes the gate; other people's
    kernels that fail are left out, with the reason."""
    begin = time.perf_counter()
    known = {backend.name: backend for backend in backends()}
    result = _nothing_of(case)

    own = [known[c.name] for c in contenders if c.kind == "openvsa"]
    for backend in own:
        say(f"gate of {backend.name}")
        _gate_small(backend, case, device, result)
    if not result["failed"]:
        say("inputs and plans")
        problem = _Problem(case, device)
        result["plans"] = problem.describe_plans()
        entries = list(_entries(problem, contenders, result))
        oracles: dict[str, gate_timed.Expected] = {}
        entries = _gate_timed(problem, entries, oracles, result, say)
    if result["failed"]:
        return {**result, "passed": False, "seconds": round(time.perf_counter() - begin, 1)}

    say("memory")
    peaks = {}
    for entry in entries:
        if entry.needs_grad:
            entry.both()
            peaks[entry.key] = peak_bytes(entry.both, device, entry.input_bytes)
    calls = {(entry.key, name): call for entry in entries for name, call in entry.calls().items()}
    calls[("matmul", "matmul", "-"), "forward"] = _matmul(case, device)
    say(f"timing {len(calls)} calls")
    before = gpu_clocks(device)
    times = time_interleaved(calls, device, case_seconds)
    result["clocks"] = {"before": before, "after": gpu_clocks(device)}
    # A result may depend on what ran before: a counter that is not set back, memory that is used again.
    del calls
    still = _gate_timed(problem, entries, oracles, result, say, "after timing: ")
    if result["failed"]:
        return {**result, "passed": False, "seconds": round(time.perf_counter() - begin, 1)}
    wrong = {entry.key for entry in entries} - {entry.key for entry in still}
    times = {key: timing for key, timing in times.items() if key[0] not in wrong}
    result["rows"] = _rows(case, still, times, peaks, device)
    return {**result, "passed": True, "seconds": round(time.perf_counter() - begin, 1)}


def _nothing_of(case: Case) -> dict[str, Any]:
    """The results of a case before there are any."""
    return {
        "name": case.name, **case.describe(), "gate": {}, "left_out": [], "failed": [], "rows": [], "seconds": 0.0,
    }  # fmt: skip


class _Problem:
    """The tensors and plans of a case, in block order."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        layout, dtype = case.layout, case.torch_dtype
        q, k = smooth_queries_and_keys(layout, case.batch, case.heads, case.key_heads, case.head_dim, device)
        generator = torch.Generator(device).manual_seed(1)

        def noise(heads: int) -> Tensor:
            shape = (case.batch, layout.num_tokens, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.weight = noise(case.heads)
        self.grad = noise(case.heads)
        self.q, self.k = (layout.permute(x.to(dtype)) for x in (q, k))
        self.v = noise(case.key_heads)
        self.scale = case.head_dim**-0.5
        self.plans = {spec: make_plan(spec.pattern, self.q, self.k, case.layout, spec.density) for spec in case.plans}
        for plan in self.plans.values():
            plan.transpose_csr()

    def inputs(self, plan: BlockPlan) -> Inputs:
        shape = (self.case.batch, self.case.heads, self.case.layout.num_tokens)
        nothing = torch.zeros((), device=self.device).expand(shape)
        return Inputs(self.q, self.k, self.v, plan, self.grad, nothing, self.scale)

    def dense_plan(self) -> BlockPlan:
        """What dense attention computes, for the oracle."""
        return BlockPlan.dense(self.case.layout.q_blocks, self.case.layout.blocks, self.device)

    def describe_plans(self) -> dict[str, Any]:
        return {
            str(spec): {
                "pattern": spec.pattern,
                "asked": spec.density,
                "density": plan.density,
                "shared_with_next": float(shared_with_next(plan).mean()),
                "pairs": _pairs(plan, self.case),
            }
            for spec, plan in self.plans.items()
        }


def _pairs(plan: BlockPlan, case: Case) -> int:
    """Token pairs over the batch and heads of the case, where the plan may be shared by them."""
    return plan.cost * (case.batch * case.heads // (plan.kv_num_blocks.shape[0] * plan.kv_num_blocks.shape[1]))


def _gate_small(backend: Backend, case: Case, device: torch.device, result: dict[str, Any]) -> None:
    try:
        found = gate.check_small(backend, case, device)
    except Exception as error:  # a kernel that does not run has not passed
        result["failed"].append({"contender": backend.name, "why": _words(error)})
        return
    result["gate"][backend.name] = {
        "compared": found.compared, "of_allowed": found.share, "left_out": found.left_out,
    }  # fmt: skip
    result["failed"] += [{"contender": backend.name, "why": why} for why in found.complaints]


def _entries(problem: _Problem, contenders: Sequence[Contender], result: dict[str, Any]) -> list[Entry]:
    """What can be timed; the rest goes to `left_out` with its reasons."""
    case, found = problem.case, []
    dense = problem.dense_plan()
    raster = [case.layout.unpermute(x) for x in (problem.q, problem.k, problem.v)]
    for contender in contenders:
        plans = {"-": dense} if contender.kind == "dense" else {str(s): p for s, p in problem.plans.items()}
        for name, plan in plans.items():
            possible = _possible(problem, contender, name, plan, result)
            if possible is None:
                continue
            try:
                attend = contender.prepare(None if contender.kind == "dense" else plan, case)
            except Exception as error:  # a peer whose API is another one than expected
                _leave_out(result, contender, name, "all", [_words(error)])
                continue
            tensors = problem.q, problem.k, problem.v, problem.grad
            if contender.heads_first:
                tensors = tuple(x.transpose(1, 2).contiguous() for x in tensors)
            pairs = case.dense_pairs if contender.kind == "dense" else _pairs(plan, case)
            size = 0 if contender.kind == "dense" else _plan_bytes(plan)
            found.append(
                Entry("attention", contender, name, attend, tensors[:3], tensors[3], plan, pairs, possible, size)
            )
        if contender.kind != "openvsa":
            continue
        for density in dict.fromkeys(spec.density for spec in case.plans):
            budget = Budget(keep_ratio=density)
            plan = PooledTopK()(problem.q, problem.k, case.layout, budget)
            name = f"selected {share_name(density)}"
            possible = _possible(problem, contender, name, plan, result)
            if possible is not None:
                attend = partial(_whole_op, contender.name, case, budget)
                tensors, pairs = (*raster, problem.weight), _pairs(plan, case)
                found.append(
                    Entry("vsa", contender, name, attend, tensors, problem.grad, plan, pairs, possible, budget=budget)
                )
    return found


def _whole_op(backend: str, case: Case, budget: Budget, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return video_sparse_attention(q, k, v, case.layout, budget, weight, backend=backend)


def _possible(
    problem: _Problem, contender: Contender, name: str, plan: BlockPlan, result: dict[str, Any]
) -> bool | None:
    """Whether the contender can do backward too; None if it cannot run at all."""
    q, k, v = problem.q, problem.k, problem.v
    reasons = contender.reasons(Problem.of(q, k, v, plan), problem.case)
    if reasons:
        _leave_out(result, contender, name, "all", reasons)
        return None
    reasons = contender.reasons(Problem.of(q.detach().requires_grad_(), k, v, plan), problem.case)
    if reasons:
        _leave_out(result, contender, name, "backward", reasons)
    return not reasons


def _leave_out(result: dict[str, Any], contender: Contender, plan: str, what: str, reasons: list[str]) -> None:
    for known in result["left_out"]:
        if (known["contender"], known["pass"], known["reasons"]) == (contender.name, what, reasons):
            known["plans"].append(plan)
            return
    result["left_out"].append({"contender": contender.name, "pass": what, "reasons": reasons, "plans": [plan]})


def _gate_timed(
    problem: _Problem, entries: list[Entry], oracles: dict[str, gate_timed.Expected], result: dict[str, Any],
    say: Say, when: str = "",
) -> list[Entry]:  # fmt: skip
    """Check each contender on the very problem that is timed; returns those that passed. `oracles` keeps what is
    expected with each plan."""
    case, passed = problem.case, []
    weight = case.layout.permute(problem.weight)
    for entry in entries:
        say(f"{when}gate of {entry.contender.name} on {entry.plan}, the timed problem")
        inputs = problem.inputs(entry.block_plan)
        chosen = []
        try:
            if entry.plan not in oracles:
                # The whole op is not compared by key blocks, and dense attention has the most to compute for each.
                kv_heads = 0 if entry.budget is not None else 1 if entry.contender.kind == "dense" else 2
                oracles[entry.plan] = gate_timed.expect(inputs, kv_heads)
            expected = oracles[entry.plan]
            if entry.budget is not None:
                chosen = gate_timed.check_selection(problem.q, problem.k, inputs.plan, case.layout, entry.budget)
                found = gate_timed.check_whole_op(
                    entry.attend, inputs, weight, case.layout, expected, needs_grad=entry.needs_grad
                )
            else:
                found = gate_timed.check_attention(
                    f"{entry.contender.name} on {entry.plan}", entry.attend, inputs, expected,
                    heads_first=entry.contender.heads_first, needs_grad=entry.needs_grad,
                )  # fmt: skip
            complaints = [*(f"whole op: selection: {why}" for why in chosen), *found.complaints]
            result["gate"].setdefault(entry.contender.name, {}).setdefault("sampled", {})[
                f"{entry.op} {entry.plan}"
            ] = found.share
        except Exception as error:  # what cannot run has not passed
            complaints = [_words(error)]
        complaints = [when + why for why in complaints]
        if not complaints:
            passed.append(entry)
        elif entry.contender.kind == "openvsa":
            result["failed"] += [{"contender": entry.contender.name, "why": why} for why in complaints]
        else:
            _leave_out(result, entry.contender, entry.plan, "all", complaints)
    return passed


def _plan_bytes(plan: BlockPlan) -> int:
    tensors = (plan.kv_num_blocks, plan.kv_indices, *plan.transpose_csr())
    return sum(x.numel() * x.element_size() for x in tensors)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _matmul(case: Case, device: torch.device) -> Callable[[], object]:
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(case.torch_dtype) for _ in range(2))
    return lambda: a @ b


def _rows(
    case: Case, entries: list[Entry], times: dict[Any, Timing], peaks: dict[Any, int | None], device: torch.device
) -> list[dict[str, Any]]:
    """One row a call. TFLOP/s count computed pairs; `of` is their ratio to each dense contender of the same pass, and
    `faster` how many times less time it took than that one."""
    by_key = {entry.key: entry for entry in entries}
    rows = []
    for (key, name), timing in times.items():
        op, contender, plan = key
        entry = by_key.get(key)
        if entry is None:
            kind, flop = "ceiling", 2 * MATMUL_SIZE[device.type] ** 3
        else:
            kind, flop = entry.contender.kind, FLOP_PER_PAIR * case.head_dim * entry.pairs * PASSES[name]
        rows.append({
            "op": op, "contender": contender, "kind": kind, "plan": plan, "pass": name, **asdict(timing),
            "tflops": flop / timing.ms / 1e9, "peak_bytes": peaks.get(key) if name == "both" else None,
        })  # fmt: skip
    for row in rows:
        rivals = [r for r in rows if r["kind"] == "dense" and r["pass"] == row["pass"]]
        row["of"] = {r["contender"]: row["tflops"] / r["tflops"] for r in rivals}
        row["faster"] = {r["contender"]: r["ms"] / row["ms"] for r in rivals}
    return rows
