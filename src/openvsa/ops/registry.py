"""The backends there are, best first, and the choice among them."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import metadata

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from openvsa import config
from openvsa.errors import UnsupportedError
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.custom_op import run_kernel
from openvsa.ops.reference import reference_attention
from openvsa.plan import BlockPlan

__all__ = ["backends", "choose"]


def backends() -> tuple[Backend, ...]:
    """All backends, in the order in which `auto` tries them."""
    return _BACKENDS


def choose(problem: Problem, name: str = "auto") -> Backend:
    """The backend `name`, or for "auto" the first that can run `problem`.

    Raises:
        UnsupportedError: the named backend cannot run it, none can, or there is none of that name; `.reasons` has
            every reason of every backend considered.
    """
    known = {backend.name: backend for backend in backends()}
    if name != "auto" and name not in list(known):  # a list, for what has no hash
        raise UnsupportedError(f"there is no backend {name!r}; choose 'auto' or one of {', '.join(known)}")
    reasons = {}
    for backend in known.values() if name == "auto" else [known[name]]:
        reasons[backend.name] = backend.unsupported_reasons(problem)
        if name == "auto" and not reasons[backend.name]:
            reasons[backend.name] = backend.auto_reasons(problem)
        if not reasons[backend.name]:
            return backend
    who = "no backend can" if name == "auto" else f"the backend {name!r} cannot"
    raise UnsupportedError(f"{who} run this problem ({problem})", reasons)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    return reference_attention(q, k, v, plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices, scale)


def _run_flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    from openvsa.ops.backends import flex

    return flex.attention(q, k, v, plan, scale)


@config.machine_fact
def _triton_available(device_type: str) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed (pip install 'openvsa[triton]')"]
    if device_type == "cpu" and not config.triton_interpret():
        return ["on CPU tensors it only runs in Triton's interpreter (set TRITON_INTERPRET=1 before starting Python)"]
    return []


def _triton_reasons(problem: Problem) -> list[str]:
    reasons = []
    # The major number alone: torch.compile in torch 2.11 cannot compare the tuple.
    if problem.capability and problem.capability[0] < 8:
        reasons.append(f"needs a GPU of compute capability 8.0 or newer, not {problem.capability}")
    for name, count in (("batch", problem.batch), ("number of heads", problem.num_heads)):
        if count > 65535:  # the second and third dimension of a grid
            reasons.append(f"takes a {name} of at most 65535, not {count}")
    return reasons


def _flex_reasons(problem: Problem) -> list[str]:
    reasons = []
    for name, size in (("query", problem.max_q_block), ("key", problem.max_kv_block)):
        # Inductor's kernels work in up to 128 x 128 and, on Hopper backward, in nothing smaller.
        if size % 128:
            reasons.append(f"needs {name} blocks of 128 tokens or a multiple, not {size}")
    if problem.head_dim & (problem.head_dim - 1):
        reasons.append(f"needs a head_dim that is a power of two, not {problem.head_dim}")
    return reasons


@cache  # it reads files, and `auto` asks in every call
def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@config.machine_fact
def _hopper_available(device_type: str) -> list[str]:
    missing = [name for name in ("cuda-core", "cuda-bindings") if _installed_version(name) is None]
    if missing:
        return [f"{' and '.join(missing)} not installed (pip install 'openvsa[hopper]')"]
    found = _installed_version("cuda-core")
    # Older ones have other names; numba-cuda, for one, brings them.
    old = found is not None and TorchVersion(found) < _CUDA_CORE_OLDEST
    return [f"needs cuda-core {_CUDA_CORE_OLDEST} or newer, not {found} (pip install 'openvsa[hopper]')"] if old else []


@cache  # loading it takes a third of a second
def _nvrtc_and_driver() -> tuple[int, int] | str:
    """The major version of CUDA that NVRTC is of, and a thousand times that of the driver (0 without a GPU); or why
    NVRTC cannot be loaded."""
    try:
        from cuda.bindings import driver, nvrtc  # pyright: ignore[reportAttributeAccessIssue]

        major = nvrtc.nvrtcVersion()[1]
        version = driver.cuDriverGetVersion()[1] if torch.cuda.is_available() else 0
    except Exception as error:  # a missing library is a RuntimeError or an error of cuda-pathfinder
        return " ".join(str(error).split())[:200]
    return major, version


@config.machine_fact
def _nvrtc_reasons() -> list[str]:
    found = _nvrtc_and_driver()
    if isinstance(found, str):
        return [
            f"NVRTC, which compiles its kernels, cannot be loaded ({found}); pip install 'openvsa[hopper]' brings it"
        ]
    major, version = found
    if not version or major <= version // 1000:
        return []
    # Code of a later major version is refused by the driver, with words of its own.
    older = f"{version // 1000}.{version % 1000 // 10}"
    return [
        f"NVRTC is of CUDA {major} and the driver of CUDA {older}; update the driver, or "
        f"pip install 'cuda-core[cu{version // 1000}]'"
    ]


def _hopper_reasons(problem: Problem) -> list[str]:
    reasons = []
    found = problem.capability
    # Number by number: torch.compile in torch 2.11 cannot compare the tuple.
    if problem.device_type == "cuda" and not (found and found[0] == 9 and found[1] == 0):
        reasons.append(f"its kernels are for compute capability 9.0 (H100, H200), not {problem.capability}")
    elif problem.device_type == "cuda" and not _hopper_available("cuda"):
        reasons += _nvrtc_reasons()
    if 64 < problem.head_dim < 128:
        reasons.append(f"takes head_dim 64 and 128, not {problem.head_dim}")
    return reasons


@config.machine_fact
def _fa4_available(device_type: str) -> list[str]:
    found = _installed_version("flash-attn-4")
    if found is None:
        return ["the package flash-attn-4 is not installed (pip install 'openvsa[fa4]')"]
    # Older ones take blocks of 128 x 128 only.
    old = TorchVersion(found) < _FA4_OLDEST
    return [f"needs flash-attn-4 {_FA4_OLDEST} or newer, not {found}"] if old else []


def _fa4_reasons(problem: Problem) -> list[str]:
    """What flash-attn-4 4.0.0b36 takes; it does not refuse all else by itself (on 8.x it ignores the lists)."""
    reasons = []
    q_block, kv_block = problem.max_q_block, problem.max_kv_block
    if problem.head_dim % 8:
        reasons.append(f"needs a head_dim that is a multiple of 8, not {problem.head_dim}")
    major = problem.capability[0] if problem.capability else None
    if major == 9:
        if q_block % 64:
            reasons.append(f"needs query blocks of 64 tokens or a multiple, not {q_block}")
        if kv_block not in (64, 128):
            reasons.append(f"needs key blocks of 64 or 128 tokens, not {kv_block}")
        if problem.needs_grad and kv_block != 128:
            reasons.append(f"its backward needs key blocks of 128 tokens, not {kv_block}")
        if problem.needs_grad and problem.head_dim <= 64 and q_block % 128:
            reasons.append(f"its backward needs query blocks of 128 tokens or a multiple, not {q_block}")
    elif major in (10, 11):
        if q_block % 256:
            reasons.append(f"needs query blocks of 256 tokens or a multiple, not {q_block}")
        if kv_block % 128:
            reasons.append(f"needs key blocks of 128 tokens or a multiple, not {kv_block}")
    elif problem.device_type == "cuda":
        reasons.append(f"is block-sparse on GPUs of compute capability 9, 10 and 11, not on {problem.capability}")
    return reasons


def _fa4_auto_reasons(problem: Problem) -> list[str]:
    # On an H200 at head_dim 128, forward and backward: 128 x 128 697 and 600 TFLOP/s, the hopper backend 644 and 485;
    # 64 x 64 forward 453 against 559.
    on_hopper = bool(problem.capability) and problem.capability[0] == 9
    if on_hopper and (problem.max_q_block % 128 or problem.max_kv_block != 128):
        return ["'auto' leaves it out: with blocks smaller than 128 x 128 this package's own kernels are faster"]
    return []


def _reference_auto_reasons(problem: Problem) -> list[str]:
    scores = problem.batch * problem.num_heads * problem.q_tokens * problem.kv_tokens * problem.dtype.itemsize
    if scores <= _DENSE_SCORES:
        return []
    return [
        f"'auto' leaves it out: its dense scores would take {scores / 2**30:.1f} GiB, more than "
        f"{_DENSE_SCORES / 2**30:g} GiB; if that is meant, pass backend='reference'"
    ]


_CUDA_CORE_OLDEST = "1.0"
_FA4_OLDEST = "4.0.0b36"
_DENSE_SCORES = 2 << 30  # bytes of one score matrix; the oracle holds several of them at once
_HALF_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)

_BACKENDS = (
    Backend(
        name="cpu",
        summary="gathers the kept blocks and multiplies only those; plain torch, all cores",
        run=lambda q, k, v, plan, scale: run_kernel("cpu", q, k, v, plan, scale),
        dtypes=(*_HALF_AND_FLOAT, torch.float64),
        device_types=("cpu",),
    ),
    Backend(
        name="fa4",
        summary="FlashAttention-4, for equal blocks; gradients for key blocks of 128",
        run=lambda q, k, v, plan, scale: run_kernel("fa4", q, k, v, plan, scale),
        dtypes=(torch.bfloat16, torch.float16),
        device_types=("cuda",),
        head_dim=(32, 128),
        ragged=False,
        head_dim_v_differs=False,
        deterministic=False,
        available=_fa4_available,
        extra_reasons=_fa4_reasons,
        auto_reasons=_fa4_auto_reasons,
    ),
    Backend(
        name="hopper",
        summary="CUDA kernels for H100 and H200, compiled on first use; forward and backward, deterministic",
        run=lambda q, k, v, plan, scale: run_kernel("hopper", q, k, v, plan, scale),
        dtypes=(torch.bfloat16, torch.float16),
        device_types=("cuda",),
        head_dim=(64, 128),
        max_block=128,
        head_dim_v_differs=False,
        available=_hopper_available,
        extra_reasons=_hopper_reasons,
    ),
    Backend(
        name="triton",
        summary="Triton kernels, forward and backward, deterministic",
        run=lambda q, k, v, plan, scale: run_kernel("triton", q, k, v, plan, scale),
        dtypes=_HALF_AND_FLOAT,
        device_types=("cuda", "cpu"),
        head_dim=(16, 256),
        max_block=128,
        head_dim_v_differs=False,
        available=_triton_available,
        extra_reasons=_triton_reasons,
    ),
    Backend(
        name="flex",
        summary="PyTorch's FlexAttention, compiled on first use",
        run=_run_flex,
        dtypes=_HALF_AND_FLOAT,
        device_types=("cuda",),  # on the CPU FlexAttention gives neither lse nor gradients
        ragged=False,
        head_dim_v_differs=False,
        extra_reasons=_flex_reasons,
    ),
    Backend(
        name="reference",
        summary="the oracle: dense scores, masked; any device and dtype, memory grows with the square of tokens",
        run=_run_reference,
        dtypes=(*_HALF_AND_FLOAT, torch.float64),
        auto_reasons=_reference_auto_reasons,
    ),
)
