"""The Hopper kernels as far as a machine without a GPU goes: every variant compiles, without complaint."""

from __future__ import annotations

import runpy
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import get_args

import pytest
import torch
from cuda.core import Program, ProgramOptions

from openvsa.errors import UnsupportedError
from openvsa.ops import registry
from openvsa.ops.backends.hopper import compiler
from openvsa.ops.backends.hopper.compiler import Kernel, Variant
from openvsa.ops.capability import Problem

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hopper_variants.py"
PROBLEM = Problem(
    device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, head_dim=128, head_dim_v=128, batch=1, num_heads=4,
    num_kv_heads=2, q_tokens=1000, kv_tokens=1000, max_q_block=64, max_kv_block=64, uniform=False, needs_grad=True,
    deterministic=True,
)  # fmt: skip

VARIANTS = [
    Variant(kernel, head_dim, half_float, q_pieces, kv_pieces)
    for kernel in get_args(Kernel)
    for head_dim in (64, 128)
    for half_float in (False, True)
    for q_pieces in (1, 2)
    for kv_pieces in (1, 2)
    if kernel.endswith("_wide") == ((kv_pieces if kernel.startswith("dkv") else q_pieces) == 2)
    or (kernel, head_dim, q_pieces) == ("forward", 64, 2)
    if (kernel, head_dim) in compiler._SHAPES
]


def reasons(problem: Problem) -> list[str]:
    (backend,) = (b for b in registry.backends() if b.name == "hopper")
    return backend.unsupported_reasons(problem)


def local_bytes(variant: Variant) -> int:
    """Memory that spilled registers of a thread take, as the driver knows it."""
    torch.zeros((), device="cuda")  # makes the context that the driver wants
    kernel = compiler.compile_variant(variant).get_kernel(compiler._ENTRIES[variant.kernel])
    return kernel.attributes.local_size_bytes


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_without_spills_or_waits_of_the_assembler(variant: Variant) -> None:
    """The assembler says so when it puts a wait after every product, and then a kernel is slower by half."""
    log = StringIO()
    code = compiler.compile_variant(variant, log)
    assert len(code.code) > 10_000
    said = log.getvalue()
    if torch.cuda.is_available():
        assert local_bytes(variant) == 0
        if not said:  # NVRTC 13.0 does not pass on what the assembler says
            return
    assert "bytes spill stores" in said
    assert "warning" not in said
    assert "Potential Performance Loss" not in said
    assert " 0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (key, shape)
        for key, tried in runpy.run_path(str(BENCHMARK))["VARIANTS"].items()
        for _, folder, shape in tried
        if folder is None and shape is not None
    ],
    ids=str,
)
def test_other_shapes_that_the_benchmark_runs_compile(
    key: tuple[Kernel, int], shape: compiler._Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compiler._SHAPES, key, shape)
    assert len(compiler.compile_variant(Variant(*key, False, 1, 1)).code) > 10_000


def test_all_lanes_may_arrive_for_a_tool_that_follows_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of the kernels in which racecheck can follow the barriers (scripts/sanitize.py)."""
    for kernel in get_args(Kernel):
        variant = next(v for v in VARIANTS if v.kernel == kernel)
        monkeypatch.setattr(compiler, "ARRIVING_LANES", 1)
        usual = compiler.compile_variant(variant).code
        monkeypatch.setattr(compiler, "ARRIVING_LANES", 32)
        assert compiler.compile_variant(variant).code != usual


def test_a_fault_in_the_source_is_an_error() -> None:
    source = (files("openvsa.ops.backends.hopper") / "common.cuh").read_text()
    with pytest.raises(Exception, match="HEAD_DIM"):
        Program(source, "c++", ProgramOptions(std="c++17", arch="sm_90a")).compile("cubin")


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(PROBLEM) == []
    assert reasons(replace(PROBLEM, head_dim=64, head_dim_v=64, max_q_block=128)) == []
    for change, reason in (
        ({"capability": (10, 0)}, "compute capability 9.0"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"head_dim": 96, "head_dim_v": 96}, "head_dim 64 and 128, not 96"),
        ({"dtype": torch.float32}, "not float32"),
        ({"max_kv_block": 130}, "at most 128 tokens, not 130"),
        ({"device_type": "cpu", "capability": None}, "not on cpu"),
    ):
        (found,) = reasons(replace(PROBLEM, **change))
        assert reason in found
    monkeypatch.setattr(registry, "_installed_version", lambda name: None if name == "cuda-core" else "1")
    (found,) = reasons(PROBLEM)
    assert found == "cuda-core not installed (pip install 'openvsa[hopper]')"
    with pytest.raises(UnsupportedError, match=r"openvsa\[hopper\]"):
        registry.choose(PROBLEM, "hopper")
    monkeypatch.setattr(registry, "_installed_version", lambda name: "0.3.2")
    (found,) = reasons(PROBLEM)
    assert found == "needs cuda-core 1.0 or newer, not 0.3.2 (pip install 'openvsa[hopper]')"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("no libnvrtc.so.13", "NVRTC, which compiles its kernels, cannot be loaded (no libnvrtc.so.13)"),
        ((13, 12080), "NVRTC is of CUDA 13 and the driver of CUDA 12.8; update the driver, or pip install"),
    ],
)
def test_a_compiler_that_does_not_fit_the_driver_is_a_reason(
    found: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no fault in the first call: `auto` goes on to the next backend, and `openvsa doctor` says why."""
    monkeypatch.setattr(registry, "_nvrtc_and_driver", lambda: found)
    (said,) = reasons(PROBLEM)
    assert said.startswith(reason)
    monkeypatch.setattr(registry, "_nvrtc_and_driver", lambda: (12, 13000))
    assert reasons(PROBLEM) == []


def test_the_order_in_which_auto_asks() -> None:
    names = [backend.name for backend in registry.backends()]
    assert names.index("fa4") < names.index("hopper") < names.index("triton") < names.index("reference")


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_auto_takes_it_before_triton(head_dim: int, uniform: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, head_dim=head_dim, head_dim_v=head_dim, uniform=uniform)
    backends = tuple(
        replace(b, available=lambda device_type: []) if b.name == "triton" else b for b in registry.backends()
    )
    monkeypatch.setattr(registry, "_BACKENDS", backends)
    assert registry.choose(problem).name == "hopper"


@pytest.mark.parametrize(
    ("lengths", "head_dim", "kernel", "pieces"),
    [
        ((64, 64), 128, "forward", (1, 1)),
        ((30, 128), 128, "forward", (1, 2)),
        ((65, 1), 128, "forward_wide", (2, 1)),
        ((65, 1), 64, "forward", (2, 1)),
    ],
)
def test_which_variant(lengths: tuple[int, int], head_dim: int, kernel: str, pieces: tuple[int, int]) -> None:
    empty = torch.empty(0, dtype=torch.int32)
    plan = compiler.PlanTensors(empty, empty, empty, empty, None, None, *lengths)
    variant = Variant.of("forward", torch.empty(1, 1, 1, head_dim, dtype=torch.float16), plan)
    assert variant == Variant(kernel, head_dim, True, *pieces)  # pyright: ignore[reportArgumentType]
