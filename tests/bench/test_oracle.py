"""The block-by-block oracle says what the reference says, and the whole-op formula what the reference backend says."""

from __future__ import annotations

import pytest
import torch

from helpers import Case, make_inputs
from openvsa import BlockPlan, Budget, TileLayout, video_sparse_attention
from openvsa.bench import oracle
from openvsa.bench.gate import plain_vsa
from openvsa.bench.oracle import Sample, run_reference, run_sample, sample_sensitivity, sampled, sensitivity
from openvsa.select import PooledTopK

RAGGED = Case(
    "bench-ragged", (7, 16, 3, 16, 9), (16, 5, 16, 11), batch=2, heads=4, kv_heads=2, plan_batch=2, plan_heads=4,
    empty_row=True,
)  # fmt: skip
SHARED_PLAN = Case("bench-shared", (16, 16, 5), (8, 8, 8, 3), batch=2, heads=2, kv_heads=2)


@pytest.mark.parametrize("case", [RAGGED, SHARED_PLAN], ids=str)
@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_sampled_blocks_are_those_of_the_reference(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(oracle._CHUNK_BYTES, "cpu", chunk)
    inputs = make_inputs(case, torch.float64)
    inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    sample = Sample(batch=1 if case.batch > 1 else 0, kv_head=1, q_blocks=(0, 1, 2), kv_blocks=(1, 3))
    whole = run_reference(inputs, torch.float64)._asdict()
    expected = sampled(whole, inputs.plan, sample, case.heads // case.kv_heads)
    for name, value in run_sample(inputs, sample, torch.float64)._asdict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    exact = run_reference(inputs, torch.float64)
    expected = sampled(sensitivity(inputs, exact)._asdict(), inputs.plan, sample, case.heads // case.kv_heads)
    for name, value in sample_sensitivity(inputs, sample)._asdict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"terms of {name}: {text}")


def test_only_query_blocks_can_be_asked_for() -> None:
    inputs = make_inputs(RAGGED, torch.float64)
    found = run_sample(inputs, Sample(0, 0, (4,), ()), torch.float64)
    assert found.out.shape == (9, 32)
    assert found.dk.shape == (0, 32)


@pytest.mark.parametrize(("prefix", "q_tiles"), [(0, ()), (11, ()), (11, (1, 2, 1))])
def test_the_formula_of_the_whole_op(prefix: int, q_tiles: tuple[int, ...]) -> None:
    layout = TileLayout((3, 5, 6), (2, 2, 4), prefix, q_tiles=q_tiles)
    q, k, v, w = (torch.randn(2, layout.num_tokens, h, 8, dtype=torch.float64) for h in (4, 2, 2, 4))
    budget = Budget(keep_ratio=0.4)
    plan = PooledTopK()(layout.permute(q), layout.permute(k), layout, budget)
    expected = video_sparse_attention(q, k, v, layout, budget, w, backend="reference")
    torch.testing.assert_close(plain_vsa(q, k, v, w, layout, plan), expected)


def test_a_dense_plan_is_dense_attention() -> None:
    inputs = make_inputs(SHARED_PLAN, torch.float64)
    plan = BlockPlan.dense(inputs.plan.q_blocks, inputs.plan.kv_blocks)
    found = run_sample(inputs._replace(plan=plan), Sample(0, 0, (0, 1, 2), ()), torch.float64)
    q, k, v = (x[:1, :, :1].transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.out, expected[0, 0])
