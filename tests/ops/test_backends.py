"""Every backend of the registry against the fp64 oracle: forward, lse and all gradients.

What runs is generated from what the backends declare. A backend that cannot run on this machine at all must say why,
and must refuse with those reasons.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DEVICE, Case, equal_lens, expected, lattice_cases, make_inputs, offsets, random_lens, sample
from openvsa import BlockPlan, UnsupportedError, block_sparse_attention
from openvsa.bench.oracle import run_reference, sensitivity
from openvsa.ops.capability import Backend, capability_of
from openvsa.ops.registry import backends, choose
from tolerance import FORWARD, GRADIENT, excess

RAGGED = (16, 5, 32, 1)
BASE = Case("base", RAGGED, RAGGED)

CASES = (
    *lattice_cases(),
    replace(BASE, name="short-keys", kv_lens=random_lens(3, 1, 20, seed=2)),
    replace(BASE, name="long-keys", q_lens=(5, 30), kv_lens=random_lens(9, 1, 32, seed=3)),
    replace(BASE, name="blocks-of-1-to-128", q_lens=(1, 128, 70), kv_lens=(65, 128)),
    replace(BASE, name="blocks-of-80", q_lens=equal_lens(200, 80), kv_lens=equal_lens(160, 80)),
    replace(BASE, name="batch-2", batch=2, plan_batch=2),
    replace(BASE, name="plan-per-head", batch=2, plan_heads=2),
    replace(BASE, name="plan-per-batch-and-head", batch=2, plan_batch=2, plan_heads=2),
    replace(BASE, name="gqa-4-to-1", heads=4, kv_heads=1, plan_heads=4),
    replace(BASE, name="gqa-4-to-2", heads=4, kv_heads=2, plan_heads=1),
    replace(BASE, name="size-4", size=4.0),
    replace(BASE, name="size-16", size=16.0, heads=4, kv_heads=1),
    replace(BASE, name="negative-scores", shift=1.5, head_dim=64),
    replace(BASE, name="negative-scores-wide", q_lens=(128, 70), kv_lens=(65, 128), shift=1.0, head_dim=128),
    replace(BASE, name="empty-row", empty_row=True, plan_heads=2),
    replace(BASE, name="nan-tails", poison=True, batch=2),
    replace(BASE, name="nan-tails-gqa-bhsd", poison=True, strides="bhsd", heads=4, kv_heads=1, empty_row=True),
    replace(BASE, name="strides-bhsd", strides="bhsd", batch=2),
    replace(BASE, name="strides-sbhd", strides="sbhd", batch=2),
    replace(BASE, name="strides-bhds", strides="bhds"),
    replace(BASE, name="head-dim-16", head_dim=16),
    replace(BASE, name="head-dim-80", head_dim=80),
    replace(BASE, name="head-dim-128", head_dim=128),
    replace(BASE, name="head-dim-256", head_dim=256, heads=1, kv_heads=1),
    replace(BASE, name="read-everything", share=1.0),
    # Equal blocks, for backends that need them.
    replace(BASE, name="equal-16", q_lens=equal_lens(40, 16), kv_lens=equal_lens(56, 16), plan_heads=2),
    replace(BASE, name="equal-64", q_lens=equal_lens(192, 64), kv_lens=equal_lens(200, 64), empty_row=True),
    replace(BASE, name="equal-128", q_lens=equal_lens(384, 128), kv_lens=equal_lens(256, 128), plan_heads=2),
    replace(BASE, name="equal-128-short", q_lens=equal_lens(300, 128), kv_lens=equal_lens(200, 128), empty_row=True),
    replace(BASE, name="equal-128-nan", q_lens=equal_lens(300, 128), kv_lens=equal_lens(300, 128), poison=True),
    replace(BASE, name="equal-128-bhsd", q_lens=equal_lens(300, 128), kv_lens=equal_lens(300, 128), strides="bhsd"),
    replace(BASE, name="equal-128-gqa", q_lens=equal_lens(384, 128), kv_lens=equal_lens(256, 128), heads=4, kv_heads=1),
    replace(BASE, name="equal-128-wide", q_lens=equal_lens(300, 128), kv_lens=equal_lens(300, 128), head_dim=128),
    replace(BASE, name="equal-128-by-64", q_lens=equal_lens(300, 128), kv_lens=equal_lens(300, 64), head_dim=128),
    replace(BASE, name="equal-128-batch", q_lens=equal_lens(384, 128), kv_lens=equal_lens(300, 128), batch=2, size=4.0),
)  # fmt: skip

# Every backend can run this one where it runs at all.
A_PROBLEM = replace(BASE, q_lens=(128, 128), kv_lens=(128, 128), head_dim=64).problem(torch.bfloat16, needs_grad=False)


def runs_here(backend: Backend) -> bool:
    known = backend.device_types is None or DEVICE.type in backend.device_types
    return known and not backend.available(DEVICE.type)


def affordable(backend: Backend, case: Case) -> bool:
    """The oracle makes all scores, and Triton's interpreter takes milliseconds for a pair of blocks."""
    if backend.name == "reference":
        return case.dense_scores <= 1 << 24
    if backend.name == "triton" and DEVICE.type == "cpu":
        pieces = sum(-(-n // 32) for n in case.q_lens) * sum(-(-n // 32) for n in case.kv_lens)
        return case.batch * case.heads * pieces * case.share <= 150
    return True


def supported(*, needs_grad: bool) -> list[Any]:
    found = []
    for case in CASES:
        for backend in backends():
            for dtype in backend.dtypes:
                # Most cases leave head_dim open, and have the smallest; a backend may need the next.
                dims = (case.head_dim, 64) if case.head_dim == BASE.head_dim else (case.head_dim,)
                for sized in (replace(case, head_dim=dim) for dim in dims):
                    if backend.unsupported_reasons(sized.problem(dtype, needs_grad=needs_grad)):
                        continue
                    if affordable(backend, sized):
                        name = f"{backend.name}-{str(dtype).removeprefix('torch.')}-{case.name}"
                        found.append(pytest.param(sized, dtype, backend.name, id=name, marks=marks(backend)))
                    break
    return found


def marks(backend: Backend) -> list[pytest.MarkDecorator]:
    return [pytest.mark.triton] if backend.name == "triton" else []


def here() -> list[Any]:
    return [
        pytest.param(backend, id=backend.name, marks=marks(backend)) for backend in backends() if runs_here(backend)
    ]


def elsewhere() -> list[Any]:
    return [pytest.param(b, id=b.name) for b in backends() if not runs_here(b)]


@pytest.mark.parametrize(("case", "dtype", "backend"), supported(needs_grad=False))
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(case, dtype)
    _, q_tokens, _ = sample(case, inputs)
    with torch.no_grad():
        out, lse = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.plan, backend=backend, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, naive, terms = expected(case, dtype)
    assert excess(out[:, q_tokens], naive.out, exact.out, FORWARD, terms.out) == []
    assert excess(lse[..., q_tokens], naive.lse, exact.lse, FORWARD, terms.lse) == []


@pytest.mark.parametrize(("case", "dtype", "backend"), supported(needs_grad=True))
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(case, dtype)
    _, q_tokens, kv_tokens = sample(case, inputs)
    dq, dk, dv = gradients(inputs, backend)
    exact, naive, terms = expected(case, dtype)
    assert excess(dq[:, q_tokens], naive.dq, exact.dq, GRADIENT, terms.dq) == []
    assert excess(dk[:, kv_tokens], naive.dk, exact.dk, GRADIENT, terms.dk) == []
    assert excess(dv[:, kv_tokens], naive.dv, exact.dv, GRADIENT, terms.dv) == []
    for grad, tokens in ((dq, q_tokens), (dk, kv_tokens), (dv, kv_tokens)):
        assert (grad.index_fill(1, tokens, 0.0) == 0).all(), "a token that nothing sampled touches has a gradient"


def gradients(inputs: Any, backend: str) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, inputs.plan, backend=backend, return_lse=True)
    return torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))


def small(backend: Backend, **changes: Any) -> Case:
    """A little case of equal blocks, the last one short, in the smallest size that the backend takes."""
    cases = (
        replace(
            BASE, name=f"small-{size}", q_lens=equal_lens(3 * size, size), kv_lens=equal_lens(3 * size - 8, size),
            head_dim=dim,
        )
        for size in (16, 128)
        for dim in (BASE.head_dim, 64)
    )  # fmt: skip
    case = next(c for c in cases if not backend.unsupported_reasons(c.problem(finest(backend), needs_grad=True)))
    return replace(case, **changes)


def finest(backend: Backend) -> torch.dtype:
    """The dtype for tests that need only one: fp32 where the backend takes it."""
    return torch.float32 if torch.float32 in backend.dtypes else torch.bfloat16


def agree(backend: Backend, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """The same bits; a backend that sums gradients in no fixed order may differ by rounding."""
    if backend.deterministic:
        return same(first, second)
    eps = torch.finfo(first[0].dtype).eps
    return all((a - b).abs().max() <= 4 * eps * a.abs().max() for a, b in zip(first, second, strict=True))


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", here())
def test_every_declared_dtype_is_covered(backend: Backend) -> None:
    for needs_grad in (False, True):
        covered = [p.values[:2] for p in supported(needs_grad=needs_grad) if p.values[2] == backend.name]
        for dtype in backend.dtypes:
            assert len([case for case, covered_dtype in covered if covered_dtype == dtype]) >= 5


@pytest.mark.parametrize("backend", elsewhere())
def test_a_backend_that_cannot_run_here_says_why(backend: Backend) -> None:
    for dtype in backend.dtypes:
        problem = BASE.problem(dtype, needs_grad=False)
        reasons = backend.unsupported_reasons(problem)
        assert reasons
        with pytest.raises(UnsupportedError) as caught:
            choose(problem, backend.name)
        assert caught.value.reasons == {backend.name: tuple(reasons)}
        assert all(why in str(caught.value) for why in reasons)


@pytest.mark.parametrize("backend", [pytest.param(b, id=b.name) for b in backends()])
def test_beyond_its_limits_a_backend_refuses(backend: Backend) -> None:
    beyond = [replace(A_PROBLEM, dtype=torch.float8_e4m3fn)]
    if backend.device_types is not None:
        beyond.append(replace(A_PROBLEM, device_type="mps"))
    if backend.head_dim is not None:
        low, high = backend.head_dim
        beyond += [replace(A_PROBLEM, head_dim=dim, head_dim_v=dim) for dim in (low - 1, high + 1)]
    if backend.max_block is not None:
        too_long = backend.max_block + 1
        beyond += [replace(A_PROBLEM, max_q_block=too_long), replace(A_PROBLEM, max_kv_block=too_long)]
    if not backend.head_dim_v_differs:
        beyond.append(replace(A_PROBLEM, head_dim_v=A_PROBLEM.head_dim + 16))
    if not backend.ragged:
        beyond.append(replace(A_PROBLEM, uniform=False))
    for problem in beyond:
        with pytest.raises(UnsupportedError, match=f"'{backend.name}' cannot run") as caught:
            choose(problem, backend.name)
        added = set(caught.value.reasons[backend.name]) - set(backend.unsupported_reasons(A_PROBLEM))
        assert added, f"no reason of its own for {problem}"


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("backend", here())
def test_scales_that_are_not_positive(backend: Backend, scale: float) -> None:
    inputs = make_inputs(small(backend), finest(backend))
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = block_sparse_attention(*leaves, inputs.plan, scale=scale, backend=backend.name, return_lse=True)
    found = out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.grad_out, inputs.grad_lse))
    scaled = inputs._replace(scale=scale)
    exact, naive = (run_reference(scaled, dtype) for dtype in (torch.float64, out.dtype))
    for ours, plain, oracle, factor, terms in zip(
        found, naive, exact, (FORWARD,) * 2 + (GRADIENT,) * 3, sensitivity(scaled, exact), strict=True
    ):
        assert excess(ours, plain, oracle, factor, terms) == []


@pytest.mark.parametrize("backend", here())
def test_an_empty_batch(backend: Backend) -> None:
    q, k, v, plan, *_ = make_inputs(small(backend), finest(backend))
    leaves = [x[:0].detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*leaves, plan, backend=backend.name, return_lse=True)
    assert (out.shape, lse.shape) == (leaves[0].shape, (0, q.shape[2], q.shape[1]))
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert [grad.shape for grad in grads] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", here())
def test_same_input_same_bits(backend: Backend) -> None:
    inputs = make_inputs(small(backend), finest(backend))
    with torch.no_grad():
        assert same(*(block_sparse_attention(*inputs[:4], backend=backend.name, return_lse=True) for _ in range(2)))
    assert agree(backend, *(gradients(inputs, backend.name) for _ in range(2)))


@pytest.mark.parametrize("backend", [b for b in backends() if not b.deterministic], ids=lambda b: b.name)
def test_where_torch_is_deterministic_unordered_gradients_are_refused(backend: Backend) -> None:
    problem = replace(A_PROBLEM, needs_grad=True)
    added = set(backend.unsupported_reasons(replace(problem, deterministic=True)))
    (why,) = added - set(backend.unsupported_reasons(problem))
    assert "its gradients differ in the last bits" in why
    inference = replace(A_PROBLEM, deterministic=True)
    assert backend.unsupported_reasons(inference) == backend.unsupported_reasons(A_PROBLEM)


@pytest.mark.parametrize("backend", here())
def test_memory_layout_does_not_matter(backend: Backend) -> None:
    case = small(backend)
    plain = make_inputs(case, finest(backend))
    for strides, poison in (("bhsd", False), ("sbhd", True), ("bhds", False)):
        other = replace(case, strides=strides, poison=poison)
        inputs = make_inputs(other, finest(backend))
        assert torch.equal(inputs.q, plain.q)
        assert inputs.q.stride() != plain.q.stride()
        assert agree(backend, gradients(inputs, backend.name), gradients(plain, backend.name))


@pytest.mark.parametrize("backend", here())
def test_autocast_and_inference_mode_change_nothing(backend: Backend) -> None:
    case = small(backend)
    inputs = make_inputs(case, finest(backend))

    def run() -> tuple[Tensor, ...]:
        return block_sparse_attention(*inputs[:4], backend=backend.name, return_lse=True)

    plain = run()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in inputs[:3])
        out, lse = run()
    assert same((out, lse), plain)
    grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))
    assert agree(backend, grads, gradients(inputs, backend.name))
    with torch.inference_mode():
        assert same(run(), plain)


def test_memory_that_the_cpu_kept_in_inference_mode_serves_training() -> None:
    """In a new thread, which has kept nothing yet."""
    case = replace(BASE, head_dim=32)
    inputs = make_inputs(case, torch.float32)
    q, k, v, grad_out, grad_lse = (x.cpu() for x in (*inputs[:3], inputs.grad_out, inputs.grad_lse))
    plan, results = inputs.plan.to("cpu"), []

    def work() -> None:
        with torch.inference_mode():
            first = block_sparse_attention(q, k, v, plan, backend="cpu", return_lse=True)
        a, b, c = (x.detach().requires_grad_() for x in (q, k, v))
        found = block_sparse_attention(a, b, c, plan, backend="cpu", return_lse=True)
        results.append((first, found, torch.autograd.grad(found, (a, b, c), (grad_out, grad_lse))))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(results) == 2
    assert same(results[0][0], results[0][1])
    assert same(results[0][2], results[1][2])


@pytest.mark.parametrize("backend", [p for p in here() if p.id in ("cpu", "triton")])
def test_nan_in_an_unread_block_does_not_leak(backend: Backend) -> None:
    """Also into rows that read fewer blocks than others: what fills their lists up must not be read."""
    lens = (16, 9, 16, 4, 16)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    plan = BlockPlan.from_block_mask(mask[None, None], offsets(lens), offsets(lens)).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(1, 61, 1, 16, generator=generator).to(DEVICE) for _ in range(4)]
    dirty = [x.clone() for x in clean]
    for x in dirty[1:3]:
        x[:, :16] = float("nan")
    results = []
    for q, k, v, do in (clean, dirty):
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = block_sparse_attention(q, k, v, plan, backend=backend.name, return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out, lse), (q, k, v), (do, lse.detach()))))
    assert same(*results)


@pytest.mark.parametrize("backend", here())
def test_a_row_that_reads_nothing(backend: Backend) -> None:
    inputs = make_inputs(small(backend), finest(backend))
    counts = torch.zeros_like(inputs.plan.kv_num_blocks)
    plan = BlockPlan(counts, inputs.plan.kv_indices, inputs.plan.q_blocks, inputs.plan.kv_blocks)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend.name, return_lse=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", here())
def test_entries_past_the_count_are_never_read(backend: Backend) -> None:
    inputs = make_inputs(small(backend), finest(backend))
    plan = inputs.plan
    past = torch.arange(plan.kv_indices.shape[-1], device=DEVICE) >= plan.kv_num_blocks[..., None]
    assert past.any()
    garbage = plan.kv_indices.masked_fill(past, 2**30)
    spoiled = BlockPlan(plan.kv_num_blocks, garbage, plan.q_blocks, plan.kv_blocks)
    assert agree(backend, gradients(inputs, backend.name), gradients(inputs._replace(plan=spoiled), backend.name))


@pytest.mark.parametrize("backend", here())
def test_a_plan_with_broadcast_memory(backend: Backend) -> None:
    """BlockPlan.dense repeats one row without copying it."""
    inputs = make_inputs(small(backend, share=1.0), finest(backend))
    dense = BlockPlan.dense(inputs.plan.q_blocks, inputs.plan.kv_blocks, DEVICE)
    assert agree(backend, gradients(inputs, backend.name), gradients(inputs._replace(plan=dense), backend.name))


def test_what_a_grid_of_triton_cannot_hold_is_refused() -> None:
    (triton,) = (b for b in backends() if b.name == "triton")
    assert triton.extra_reasons(replace(A_PROBLEM, batch=65535)) == []
    assert triton.extra_reasons(replace(A_PROBLEM, batch=65536)) == ["takes a batch of at most 65535, not 65536"]


def test_without_triton_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'openvsa\[triton\]'"):
        choose(replace(A_PROBLEM, device_type=DEVICE.type), "triton")


def test_auto_takes_the_first_that_can() -> None:
    problem = replace(A_PROBLEM, device_type=DEVICE.type, capability=capability_of(DEVICE))
    able = [b for b in backends() if not b.unsupported_reasons(problem) and not b.auto_reasons(problem)]
    assert choose(problem).name == able[0].name


def test_auto_refuses_with_the_reasons_of_all() -> None:
    problem = replace(A_PROBLEM, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="no backend can run") as caught:
        choose(problem)
    assert set(caught.value.reasons) == {backend.name for backend in backends()}
    assert all(caught.value.reasons.values())


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no backend 'fastest'; choose 'auto' or one of") as caught:
        choose(A_PROBLEM, "fastest")
    assert all(backend.name in str(caught.value) for backend in backends())
