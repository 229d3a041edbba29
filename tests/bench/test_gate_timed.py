"""The check of the timed problem lets right results pass, and stops what small problems cannot show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_cases import SMALL
from openvsa.bench import gate_timed, run
from openvsa.bench.cases import Case, PlanSpec
from openvsa.bench.contenders import contenders
from openvsa.bench.oracle import run_reference
from openvsa.config import Budget
from openvsa.ops.backends import cpu
from openvsa.select import PooledTopK, pooled

CPU = torch.device("cpu")
LONG = replace(SMALL, name="long", grid=(6, 8, 12), heads=4, kv_heads=4, plans=(PlanSpec("random", 0.25),))


def gated(case: Case = LONG) -> list[str]:
    """Why the `cpu` backend does not pass."""
    problem, result = run._Problem(case, CPU), run._nothing_of(case)
    entries = list(run._entries(problem, [contenders()["cpu"]], result))
    passed = run._gate_timed(problem, entries, {}, result, lambda text: None)
    assert bool(result["failed"]) == (len(passed) < len(entries))
    return [failure["why"] for failure in result["failed"]]


@pytest.mark.parametrize(
    "case",
    [LONG, replace(LONG, prefix=37, kv_heads=2), replace(LONG, q_tiles=(1, 2, 1), dtype="bfloat16"),
     replace(LONG, plans=(PlanSpec("model", 0.25),), batch=2)],
    ids=["equal", "text", "mixed", "batch"],
)  # fmt: skip
def test_what_is_right_passes(case: Case) -> None:
    assert gated(case) == []


def wrong_head(out: Tensor) -> Tensor:
    out = out.clone()
    out[:, :, 2] *= 1.05
    return out


def wrong_block(out: Tensor) -> Tensor:
    out = out.clone()
    out[:, 64:96] *= 1.05
    return out


@pytest.mark.parametrize("change", [wrong_head, wrong_block], ids=["head", "block"])
def test_a_wrong_part_of_the_output_is_stopped(change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(q, *rest)
        return change(out), lse

    monkeypatch.setattr(cpu, "forward", forward)
    whys = gated()
    assert any(why.startswith("cpu on random 1/4: out: ") for why in whys)
    assert any(why.startswith("whole op: out: ") for why in whys)


@pytest.mark.parametrize(
    ("which", "word"), [(0, "dq"), (1, "k . dk is not q . dq"), (2, "v . dv is not out . grad")], ids=["dq", "dk", "dv"]
)
def test_a_head_with_a_wrong_gradient_is_stopped(which: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.backward

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        grads = right(*arguments)
        grads[which][:, :, 1] *= 1.5
        return grads

    monkeypatch.setattr(cpu, "backward", backward)
    whys = gated()
    assert any("random 1/4" in why and word in why for why in whys), whys
    assert any(why.startswith("whole op: gradients: ") for why in whys), whys


def test_a_wrong_gradient_of_the_weight_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.video_sparse_attention

    def vsa(q: Tensor, k: Tensor, v: Tensor, layout: Any, budget: Budget, weight: Tensor, **options: Any) -> Tensor:
        return right(q, k, v, layout, budget, weight + 0.5 * (weight - weight.detach()), **options)

    monkeypatch.setattr(run, "video_sparse_attention", vsa)
    whys = gated()
    assert whys
    assert all(why.startswith("whole op: dw: ") for why in whys)


def test_who_errs_in_later_calls_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is checked again after it was timed."""
    right, timed = cpu.forward, []

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*arguments)
        return out * (1.05 if timed else 1), lse

    def time_interleaved(*arguments: Any) -> dict[Any, Any]:
        found = measure(*arguments)
        timed.append(True)
        return found

    measure = run.time_interleaved
    monkeypatch.setattr(cpu, "forward", forward)
    monkeypatch.setattr(run, "time_interleaved", time_interleaved)
    found = run.measure_case(SMALL, [contenders()["cpu"]], CPU, 0.01, lambda text: None)
    assert not found["passed"]
    assert found["rows"] == []
    whys = [failure["why"] for failure in found["failed"]]
    assert any(why.startswith("after timing: cpu on random 1/4: out: ") for why in whys)


def test_a_selector_that_keeps_the_worst_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pooled.rank_in_chunks
    monkeypatch.setattr(pooled, "rank_in_chunks", lambda scores_of, *rest: right(lambda i, j: -scores_of(i, j), *rest))
    whys = gated()
    assert any("selection: head 0: " in why for why in whys), whys


@pytest.mark.parametrize("prefix", [0, 37])
def test_what_a_plan_must_keep(prefix: int) -> None:
    case = replace(LONG, prefix=prefix, plans=(PlanSpec("random", 0.25), PlanSpec("model", 0.25)))
    problem = run._Problem(case, CPU)
    budget = Budget(keep_ratio=0.25)
    drawn, chosen = problem.plans.values()

    def check(plan: Any, budget: Budget = budget) -> str:
        return " ".join(gate_timed.check_selection(problem.q, problem.k, plan, case.layout, budget))

    assert check(chosen) == ""
    assert "rows drop a tile that scores higher" in check(drawn)
    assert "keeps other than" in check(chosen, Budget(keep_ratio=0.5))
    if prefix:
        lists = PooledTopK()(problem.q, problem.k, case.layout, budget).block_mask()
        lists[0, 0, -1, 0] = False
        forgot = type(chosen).from_block_mask(lists, chosen.q_blocks, chosen.kv_blocks)
        assert "a text block is not read by all" in check(forgot)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("pattern", ["random", "model"])
def test_sums_of_plain_torch_are_far_below_what_is_allowed(dtype: str, pattern: str) -> None:
    case = replace(LONG, dtype=dtype, kv_heads=2, plans=(PlanSpec(pattern, 0.25),))
    problem = run._Problem(case, CPU)
    [plan] = problem.plans.values()
    inputs = problem.inputs(plan)
    found = run_reference(inputs, case.torch_dtype)._asdict()
    found.pop("lse")
    given = inputs.q, inputs.k, inputs.v, inputs.grad_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_timed, "_SUMS_APART", gate_timed._SUMS_APART / 4)
        assert gate_timed._sums_apart(*given, **found) == []
    assert len(gate_timed._sums_apart(*given, **found | {"dv": found["dv"] * 1.5, "dk": 0 * found["dk"]})) == 2


def test_rows_of_all_heads_see_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_timed, "_MOST_ROWS", 20)
    problem = run._Problem(LONG, CPU)
    [plan] = problem.plans.values()
    rows = gate_timed._choose_rows(problem.inputs(plan))
    blocks = [plan.q_blocks.block_of_token(CPU)[tokens].tolist() for tokens in rows.tokens]
    assert all(len(set(of_head)) == len(of_head) <= 20 for of_head in blocks)
    assert {block for of_head in blocks for block in of_head} == set(range(plan.q_blocks.num_blocks))
