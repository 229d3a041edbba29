"""The FA4 backend without a GPU: what it says it can run, and what it hands to FA4.

A stand-in takes the place of the package. It reads the lists as FA4 does (block i is tokens i * size on) and computes
densely what they say, so that a wrong list, a missing one or a wrong argument gives a wrong result.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import Case, equal_lens, make_inputs, run_reference
from openvsa import MissingExtraError, UnsupportedError, block_sparse_attention
from openvsa.ops import registry
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.custom_op import run_kernel
from openvsa.ops.registry import backends, choose
from openvsa.plan.convert import lists_to_mask

HOPPER, BLACKWELL = (9, 0), (10, 0)
CPU = torch.device("cpu")
BASE = Case("fa4", equal_lens(300, 128), equal_lens(280, 128), batch=2, heads=4, kv_heads=2, plan_heads=4)


class Lists(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def token_mask(lists: Lists, q_len: int, kv_len: int, *, transposed: bool) -> Tensor:
    """bool [B|1, H|1, Sq, Skv]."""
    q_size, kv_size = lists.block_size
    rows, columns = -(-q_len // q_size), -(-kv_len // kv_size)
    if transposed:
        rows, columns = columns, rows
    assert lists.mask_block_cnt.shape[2] == lists.mask_block_idx.shape[2] == lists.full_block_cnt.shape[2] == rows
    assert lists.full_block_idx.shape[3] <= columns
    assert all(x.dtype == torch.int32 for x in lists[:4])
    assert not lists.mask_block_cnt.any(), "a block is said to be partial, and there is no mask inside blocks"
    mask = lists_to_mask(lists.full_block_cnt, lists.full_block_idx, columns)
    mask = mask.mT if transposed else mask
    return mask.repeat_interleave(q_size, 2)[:, :, :q_len].repeat_interleave(kv_size, 3)[..., :kv_len]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), scores.logsumexp(-1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    pack_gqa: bool,
    block_sparse_tensors: Lists,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    assert return_lse
    assert pack_gqa is False
    assert not torch.is_grad_enabled()
    mask = token_mask(block_sparse_tensors, q.shape[1], k.shape[1], transposed=False)
    return attend(q, k, v, mask, softmax_scale)


def _flash_attn_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float, dlse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, block_sparse_tensors: Lists,
) -> None:  # fmt: skip
    mask = token_mask(block_sparse_tensors, q.shape[1], k.shape[1], transposed=True)
    again = attend(q, k, v, mask, softmax_scale)
    assert torch.equal(again[0], out), "the backward lists are not those of the forward pass"
    assert torch.equal(again[1], lse)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    p = (scores - lse[..., None]).exp().where(mask, 0.0)
    row = (dout * out).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - (row - dlse)[..., None]) * softmax_scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, k))
    for into, weights, x in ((dk, ds, q), (dv, p, dout)):
        into.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, x).unflatten(2, (-1, groups)).sum(3))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": _flash_attn_bwd},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Lists},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "case",
    [
        BASE,
        replace(BASE, name="fa4-one-plan-for-all", plan_heads=1),
        replace(BASE, name="fa4-per-batch", plan_batch=2),
        replace(BASE, name="fa4-128-by-64", kv_lens=equal_lens(280, 64)),
        replace(BASE, name="fa4-64", q_lens=equal_lens(300, 64), kv_lens=equal_lens(280, 64), share=0.2),
        replace(BASE, name="fa4-empty-row", empty_row=True),
        replace(BASE, name="fa4-bhsd", strides="bhsd"),
    ],
    ids=str,
)
def test_lists_say_what_the_plan_says(case: Case) -> None:
    """In fp64, which FA4 itself does not take: the lists are what is tested."""
    inputs = make_inputs(case, torch.float64)
    exact = run_reference(inputs, torch.float64)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, lse = run_kernel("fa4", q, k, v, inputs.plan, inputs.scale)
    grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))
    for found, expected in zip((out, lse, *grads), exact, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.fixture
def fa4(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend as it is where the package is installed."""
    monkeypatch.setattr(registry, "_installed_version", {"flash-attn-4": "4.0.0b36"}.get)
    return next(backend for backend in backends() if backend.name == "fa4")


def problem(
    q_block: int, kv_block: int, *, grad: bool, capability: tuple[int, int] = HOPPER, dim: int = 128
) -> Problem:
    case = Case("problem", equal_lens(1024, q_block), equal_lens(1024, kv_block), head_dim=dim)
    found = case.problem(torch.bfloat16, needs_grad=grad)
    return replace(found, device_type="cuda", capability=capability)


@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        (problem(128, 128, grad=False), []),
        (problem(128, 128, grad=True), []),
        (problem(64, 128, grad=True), []),
        (problem(128, 64, grad=False), []),
        (problem(64, 64, grad=False), []),
        (problem(128, 64, grad=True), ["its backward needs key blocks of 128 tokens, not 64"]),
        (problem(64, 64, grad=True), ["its backward needs key blocks of 128 tokens, not 64"]),
        (
            problem(64, 128, grad=True, dim=64),
            ["its backward needs query blocks of 128 tokens or a multiple, not 64"],
        ),
        (problem(128, 32, grad=False), ["needs key blocks of 64 or 128 tokens, not 32"]),
        (problem(128, 256, grad=False), ["needs key blocks of 64 or 128 tokens, not 256"]),
        (problem(32, 128, grad=False), ["needs query blocks of 64 tokens or a multiple, not 32"]),
        (problem(128, 128, grad=False, dim=100), ["needs a head_dim that is a multiple of 8, not 100"]),
        (problem(128, 128, grad=False, dim=256), ["takes head_dim 32 to 128, not 256"]),
        (problem(256, 128, grad=True, capability=BLACKWELL), []),
        (
            problem(128, 64, grad=False, capability=BLACKWELL),
            [
                "needs query blocks of 256 tokens or a multiple, not 128",
                "needs key blocks of 128 tokens or a multiple, not 64",
            ],
        ),
        (
            problem(128, 128, grad=False, capability=(8, 0)),
            ["is block-sparse on GPUs of compute capability 9, 10 and 11, not on (8, 0)"],
        ),
        (
            problem(128, 128, grad=False, capability=(12, 0)),
            ["is block-sparse on GPUs of compute capability 9, 10 and 11, not on (12, 0)"],
        ),
    ],
)
def test_what_it_takes_on_each_architecture(fa4: Backend, asked: Problem, reasons: list[str]) -> None:
    assert fa4.unsupported_reasons(asked) == reasons


@pytest.mark.parametrize(("version", "taken"), [("4.0.0b35", False), ("4.0.0b36", True), ("4.0.0", True)])
def test_versions_that_take_only_one_block_size_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, taken: bool
) -> None:
    monkeypatch.setattr(registry, "_installed_version", lambda name: version)
    asked = problem(128, 64, grad=False)
    if taken:
        assert choose(asked, "fa4").name == "fa4"
    else:
        with pytest.raises(UnsupportedError, match=r"needs flash-attn-4 4\.0\.0b36 or newer, not 4\.0\.0b35"):
            choose(asked, "fa4")


@pytest.mark.parametrize(
    ("q_block", "kv_block", "grad", "taken"),
    [(128, 128, True, True), (128, 128, False, True), (128, 64, False, False), (64, 64, False, False)],
)
def test_auto_takes_it_where_it_is_faster(
    q_block: int, kv_block: int, grad: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_installed_version", lambda name: "4.0.0b36")
    monkeypatch.setattr(registry, "_nvrtc_and_driver", lambda: (13, 13000))
    asked = problem(q_block, kv_block, grad=grad)
    assert choose(asked).name == ("fa4" if taken else "hopper")
    assert choose(asked, "fa4").name == "fa4"
    assert choose(replace(asked, deterministic=True, needs_grad=True, max_kv_block=128)).name == "hopper"


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_installed_version", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'openvsa\[fa4\]'"):
        choose(problem(128, 128, grad=False), "fa4")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    inputs = make_inputs(BASE, torch.bfloat16)
    with pytest.raises(MissingExtraError, match=r"pip install 'openvsa\[fa4\]'"):
        run_kernel("fa4", *inputs[:4], inputs.scale)


def test_the_public_op_refuses_it_on_the_cpu(fa4: Backend) -> None:
    inputs = make_inputs(BASE, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="fa4: runs on cuda tensors, not on cpu"):
        block_sparse_attention(*[x.cpu() for x in inputs[:3]], inputs.plan.to(CPU), backend="fa4")


def test_auto_leaves_the_oracle_out_where_its_scores_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that nothing else runs on: 2 GiB is 2 heads of 16384 x 16384 in fp32."""
    asked = replace(
        problem(64, 64, grad=False),
        device_type="mps",
        capability=None,
        dtype=torch.float32,
        q_tokens=16384,
        kv_tokens=16384,
    )
    assert choose(asked).name == "reference"
    larger = replace(asked, batch=2)
    with pytest.raises(UnsupportedError, match=r"would take 4\.0 GiB, more than 2 GiB.*pass backend='reference'"):
        choose(larger)
    assert choose(larger, "reference").name == "reference"
