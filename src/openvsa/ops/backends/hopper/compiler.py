"""From the CUDA sources to launches: NVRTC on the user's machine, one variant for each kind of problem."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import IO, Any, Literal

import torch
from torch import Tensor

from openvsa.ops.plan_tensors import PlanTensors

TILE = 64  # rows of one consumer warpgroup; as in common.cuh
SHARED_BYTES = 227 * 1024  # what one block can have on sm_90
# How many lanes of a warp say that it is done with a tile. One is enough: __syncwarp stands before it. With 32, a tool
# that follows threads and not warps sees the same order (scripts/sanitize.py, which sets it before the first launch).
ARRIVING_LANES = 1

Kernel = Literal["forward", "forward_wide", "dq", "dq_wide", "dkv", "dkv_wide"]

_SOURCES = {
    "forward": ("common.cuh", "queries.cuh", "softmax.cuh", "forward.cu"),
    "forward_wide": ("common.cuh", "queries.cuh", "softmax.cuh", "forward_wide.cu"),
    "dq": ("common.cuh", "queries.cuh", "ring.cuh", "dq.cu"),
    "dq_wide": ("common.cuh", "queries.cuh", "ring.cuh", "dq.cu"),
    "dkv": ("common.cuh", "ring.cuh", "dkv.cu"),
    "dkv_wide": ("common.cuh", "ring.cuh", "dkv.cu"),
}
_ENTRIES = {
    "forward": "forward",
    "forward_wide": "forward_wide",
    "dq": "query_gradient",
    "dq_wide": "query_gradient",
    "dkv": "key_gradient",
    "dkv_wide": "key_gradient",
}


@dataclass(frozen=True)
class _Shape:
    """Teams, warpgroups of a team that multiply, tiles in flight, registers of a thread that loads, that multiplies.

    The tiles fill the shared memory of a multiprocessor, and the threads its 65,536 registers.
    """

    teams: int
    consumers: int
    stages: dict[str, int]
    producer_registers: int = 40
    consumer_registers: int = 232

    @property
    def threads(self) -> int:
        """Threads of a block: the warpgroups that multiply, and one whose warps load."""
        return 128 * (self.teams * self.consumers + 1)


# By kernel and head_dim, measured on an H200 (see the kernel log). Where the block that stays (of queries; in dk/dv of
# keys) is one tile of rows, teams of one, each with its own tiles; where it is two, a team of two with one list, but in
# forward at head size 64: four teams with half a block each, which read the same list, are faster there.
_SHAPES = {
    ("forward", 64): _Shape(4, 1, {"KEY_STAGES": 3, "VALUE_STAGES": 3}, producer_registers=32, consumer_registers=112),
    ("forward", 128): _Shape(3, 1, {"KEY_STAGES": 1, "VALUE_STAGES": 2}, producer_registers=32, consumer_registers=160),
    ("forward_wide", 128): _Shape(1, 2, {"KEY_STAGES": 3, "VALUE_STAGES": 4}),
    ("dq", 64): _Shape(3, 1, {"STAGES": 3}, producer_registers=32, consumer_registers=160),
    ("dq", 128): _Shape(2, 1, {"STAGES": 3}),
    ("dq_wide", 64): _Shape(1, 2, {"STAGES": 12}),
    ("dq_wide", 128): _Shape(1, 2, {"STAGES": 6}),
    ("dkv", 64): _Shape(2, 1, {"STAGES": 5}),
    ("dkv_wide", 64): _Shape(1, 2, {"STAGES": 11}),
    # The two sums of a key tile are 128 registers: these have none to spare.
    ("dkv", 128): _Shape(2, 1, {"STAGES": 2}, producer_registers=24, consumer_registers=240),
    ("dkv_wide", 128): _Shape(1, 2, {"STAGES": 5}, producer_registers=24, consumer_registers=240),
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
    def of(cls, kernel: Literal["forward", "dq", "dkv"], q: Tensor, plan: PlanTensors) -> Variant:
        """The variant for q [B, S, H, D] and a plan."""
        q_pieces, kv_pieces = (max(1, -(-length // TILE)) for length in (plan.max_q_block, plan.max_kv_block))
        wide: dict[str, Kernel] = {"forward": "forward_wide", "dq": "dq_wide", "dkv": "dkv_wide"}
        staying = kv_pieces if kernel == "dkv" else q_pieces
        head_dim, half_float = q.shape[-1], q.dtype == torch.float16
        own = wide[kernel] if staying == 2 and (wide[kernel], head_dim) in _SHAPES else kernel
        return cls(own, head_dim, half_float, q_pieces, kv_pieces)

    @property
    def shape(self) -> _Shape:
        """How the kernel fills a multiprocessor."""
        return _SHAPES[self.kernel, self.head_dim]

    @property
    def consumers(self) -> int:
        """Tiles of 64 rows in one work item."""
        return self.shape.consumers

    @property
    def macros(self) -> dict[str, int]:
        """What the sources want set from outside."""
        return {
            "HEAD_DIM": self.head_dim,
            "HALF_FLOAT": int(self.half_float),
            "Q_PIECES": self.q_pieces,
            "KV_PIECES": self.kv_pieces,
            "TEAMS": self.shape.teams,
            "CONSUMERS": self.shape.consumers,
            "PRODUCER_REGISTERS": self.shape.producer_registers,
            "CONSUMER_REGISTERS": self.shape.consumer_registers,
            "SHARED_BYTES": SHARED_BYTES,
            "ARRIVING_LANES": ARRIVING_LANES,
            "ROW_VALUES": int(self.kernel in ("dkv", "dkv_wide")),
            **self.shape.stages,
        }


def compile_variant(variant: Variant, log: IO[str] | None = None) -> Any:
    """The machine code of a variant, a `cuda.core.ObjectCode`; what the compilers say goes to `log`. Needs no GPU."""
    from cuda.core import Program, ProgramOptions  # pyright: ignore[reportAttributeAccessIssue]

    folder = files("openvsa.ops.backends.hopper")
    source = "\n".join((folder / name).read_text() for name in _SOURCES[variant.kernel])
    macros = [(name, str(value)) for name, value in variant.macros.items()]
    options = ProgramOptions(std="c++17", arch="sm_90a", define_macro=macros, ptxas_options="-v")
    return Program(source, "c++", options).compile("cubin", logs=log)


def _driver() -> Any:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    return driver


@cache
def _function(variant: Variant, device: int) -> tuple[Any, Any]:
    """The loaded kernel, and the object that keeps it loaded."""
    driver = _driver()
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
    device = torch.cuda.current_device()
    function, _ = _function(variant, device)
    blocks = min(items, _multiprocessors(device))
    values = [_as_argument(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(_address(x) for x in values))
    stream = torch.cuda.current_stream().cuda_stream
    _check(
        _driver().cuLaunchKernel(
            function, blocks, 1, 1, variant.shape.threads, 1, 1, SHARED_BYTES, stream, ctypes.addressof(pointers), 0
        )
    )


def tensor_map(x: Tensor, parts: int = 0) -> Any:
    """How tensor copies read tiles of [B, S, H, D]: dimensions (64, S, D / 64, H, B), rows of 128 bytes, swizzled.

    A copy takes 64 tokens and `parts` of the D / 64 parts of a row, or all (0).
    """
    batch, seq, heads, head_dim = x.shape
    # The stride of a dimension of size 1 is never used, but must be a legal one.
    token, head, item = (x.stride(d) * 2 if x.shape[d] > 1 else 128 for d in (1, 2, 0))
    sizes = (64, seq, head_dim // 64, heads, batch)
    return _encode(x.data_ptr(), sizes, (token, 128, head, item), (64, TILE, parts or head_dim // 64, 1, 1))


@lru_cache(maxsize=1024)  # encoding takes the host longer than a launch; the result depends on the arguments alone
def _encode(pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    driver = _driver()
    error, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16, len(sizes), pointer,
        [driver.cuuint64_t(size) for size in sizes], [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in box], [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    _check((error,))
    return encoded


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
