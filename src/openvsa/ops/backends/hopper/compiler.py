"""From the CUDA sources to launches: NVRTC on the user's machine, one variant for each kind of problem."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from openvsa.ops.plan_tensors import PlanTensors

TILE = 64  # rows of one consumer warpgroup; as in common.cuh
SHARED_BYTES = 227 * 1024  # what one block can have on sm_90

Kernel = Literal["forward", "dq", "dkv"]

_SOURCES = {
    "forward": ("common.cuh", "lists.cuh", "forward.cu"),
    "dq": ("common.cuh", "lists.cuh", "dq.cu"),
    "dkv": ("common.cuh", "dkv.cu"),
}
_ENTRIES = {"forward": "forward", "dq": "query_gradient", "dkv": "key_gradient"}

# By kernel and head_dim: consumer warpgroups, tiles in flight, registers of a producer's and of a consumer's thread.
# The tiles fill shared memory; the registers, 65,536 in all.
_SHAPES = {
    ("forward", 64): (2, 12, 40, 232),
    ("forward", 128): (2, 7, 40, 232),
    ("dq", 64): (2, 12, 40, 232),
    ("dq", 128): (2, 6, 40, 232),
    ("dkv", 64): (2, 10, 40, 232),
    ("dkv", 128): (2, 4, 40, 232),
}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. Pieces: how many tiles of 64 tokens the longest block takes."""

    kernel: Kernel
    head_dim: int
    half_float: bool
    q_pieces: int
    kv_pieces: int

    @classmethod
    def of(cls, kernel: Kernel, q: Tensor, plan: PlanTensors) -> Variant:
        """The variant for q [B, S, H, D] and a plan."""
        pieces = (max(1, -(-length // TILE)) for length in (plan.max_q_block, plan.max_kv_block))
        return cls(kernel, q.shape[-1], q.dtype == torch.float16, *pieces)

    @property
    def consumers(self) -> int:
        """Tiles of 64 rows that one block of threads works on at once."""
        return _SHAPES[self.kernel, self.head_dim][0]

    @property
    def macros(self) -> dict[str, int]:
        """What the sources want set from outside."""
        consumers, stages, producer, consumer = _SHAPES[self.kernel, self.head_dim]
        return {
            "HEAD_DIM": self.head_dim,
            "HALF_FLOAT": int(self.half_float),
            "CONSUMERS": consumers,
            "STAGES": stages,
            "Q_PIECES": self.q_pieces,
            "KV_PIECES": self.kv_pieces,
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "SHARED_BYTES": SHARED_BYTES,
            "ROW_VALUES": int(self.kernel == "dkv"),
        }


def compile_variant(variant: Variant) -> Any:
    """The cubin of a variant, a `cuda.core.ObjectCode`. Needs no GPU."""
    from cuda.core import Program, ProgramOptions

    source = "\n".join((files(__package__) / name).read_text() for name in _SOURCES[variant.kernel])
    macros = [(name, str(value)) for name, value in variant.macros.items()]
    options = ProgramOptions(std="c++17", arch="sm_90a", define_macro=macros)
    return Program(source, "c++", options).compile("cubin")


@cache
def _function(variant: Variant, device: int) -> tuple[Any, Any]:
    """The loaded kernel, and the object that keeps it loaded."""
    from cuda.bindings import driver

    code = compile_variant(variant)
    kernel = code.get_kernel(_ENTRIES[variant.kernel])
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuKernelSetAttribute(shared, SHARED_BYTES, kernel.handle, device))
    return driver.CUfunction(int(kernel.handle)), code


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(variant: Variant, items: int, *arguments: Any) -> None:
    """Run a variant on the current stream with as many blocks as the GPU holds at once, for `items` work items.

    Arguments in the order of the kernel: tensors (as pointers), ints (64 bits), floats, ctypes structures, tensor maps.
    """
    from cuda.bindings import driver

    device = torch.cuda.current_device()
    function, _ = _function(variant, device)
    values = [_as_argument(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(_address(x) for x in values))
    threads = 128 * (variant.consumers + 1)
    stream = torch.cuda.current_stream().cuda_stream
    _check(
        driver.cuLaunchKernel(
            function,
            min(items, _multiprocessors(device)),
            1,
            1,
            threads,
            1,
            1,
            SHARED_BYTES,
            stream,
            ctypes.addressof(pointers),
            0,
        )  # fmt: skip
    )


def tensor_map(x: Tensor) -> Any:
    """How tensor copies read tiles of [B, S, H, D]: dimensions (64, S, D / 64, H, B), rows of 128 bytes, swizzled."""
    from cuda.bindings import driver

    batch, seq, heads, head_dim = x.shape
    sizes = (64, seq, head_dim // 64, heads, batch)
    # The stride of a dimension of size 1 is never used, but must be a legal one.
    steps = [x.stride(d) * 2 if x.shape[d] > 1 else 128 for d in (1, 2, 0)]
    strides = (steps[0], 128, steps[1], steps[2])
    error, tensor_map = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, x.data_ptr(),
        [driver.cuuint64_t(size) for size in sizes], [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in (64, TILE, head_dim // 64, 1, 1)], [driver.cuuint32_t(1)] * 5,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    _check((error,))
    return tensor_map


def _as_argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, int):
        return ctypes.c_int64(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return x


def _address(x: Any) -> int:
    return x.getPtr() if hasattr(x, "getPtr") else ctypes.addressof(x)


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"the CUDA driver refused a call of the hopper backend: {result[0]!r}")
