"""The gate lets the package's own kernels pass and stops wrong ones, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench_cases import SMALL
from openvsa.bench.cases import CASES, Case
from openvsa.bench.gate import _small_problems, check_small
from openvsa.ops.registry import backends

CPU = torch.device("cpu")
VARIANTS = {
    "grouped": SMALL,
    "text": replace(SMALL, prefix=37),
    "mixed-tiles": replace(SMALL, q_tiles=(1, 2, 1)),
    "bfloat16": replace(SMALL, dtype="bfloat16"),
    "text-model": replace(SMALL, grid=(96,), tile=(16,)),
}


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_right_backends_pass(name: str, case: Case) -> None:
    backend = next(b for b in backends() if b.name == name)
    found = check_small(backend, case, CPU)
    assert found.complaints == []
    assert 0 < found.share <= 1
    assert found.compared == 3  # two problems, and the whole op


def test_what_a_backend_cannot_run_is_left_out_with_the_reason() -> None:
    fa4 = next(b for b in backends() if b.name == "fa4")
    found = check_small(fa4, SMALL, CPU)
    assert found.compared == 0
    assert len(found.left_out) == 2
    assert "runs on cuda tensors" in found.left_out[0]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 1.01


def _one_wrong_row(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    out = out.clone()
    out[-1, -1, -1] += 0.05
    return out, lse


WRONG = {
    "scaled": (lambda out, lse: (out * 1.001, lse), "out"),
    "one-row": (_one_wrong_row, "out"),
    "nan": (lambda out, lse: (out + float("nan"), lse), "not finite"),
    "lse": (lambda out, lse: (out, lse + 1e-3), "lse"),
    "lse-of-empty-row": (lambda out, lse: (out, lse.clamp_min(-1e30)), "lse"),
    "gradient": (lambda out, lse: (_WrongGradient.apply(out), lse), "dv"),
}


@pytest.mark.parametrize(("change", "word"), WRONG.values(), ids=WRONG)
def test_wrong_backends_are_stopped(change: Callable, word: str, register: Callable) -> None:
    found = check_small(register(change), SMALL, CPU)
    assert any(word in complaint for complaint in found.complaints), found.complaints


def test_a_whole_op_that_is_wrong_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from openvsa.bench import gate

    vsa = gate.video_sparse_attention
    monkeypatch.setattr(gate, "video_sparse_attention", lambda *a, **k: vsa(*a, **k) * 1.001)
    reference = next(b for b in backends() if b.name == "reference")
    complaints = check_small(reference, SMALL, CPU).complaints
    assert complaints
    assert all("whole op" in complaint for complaint in complaints)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_small_problems_have_the_blocks_of_the_case(case: Case) -> None:
    """So that the kernels compiled for them are those that are timed."""
    small = replace(case, head_dim=8, dtype="float32")
    (_, ragged, layout), (_, equal, _) = _small_problems(small, CPU)
    for inputs in (ragged, equal):
        plan = inputs.plan
        assert f"{plan.q_blocks.max_len}x{plan.kv_blocks.max_len}" == case.blocks
        assert inputs.q.shape[2] // inputs.k.shape[2] == case.heads // case.key_heads
        assert (plan.kv_num_blocks == 0).any()
    assert min(ragged.plan.kv_blocks.lens) < ragged.plan.kv_blocks.max_len
    assert len(case.grid) == 1 or ragged.plan.q_blocks.uniform_len is None
    assert bool(layout.text_blocks) == bool(case.prefix)
    assert equal.plan.q_blocks.uniform_len
    assert equal.plan.q_blocks.lens[-1] < equal.plan.q_blocks.max_len
