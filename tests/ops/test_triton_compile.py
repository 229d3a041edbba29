"""The Triton kernels compile for every kind of GPU, within its shared memory, on a machine that has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from absent_gpu import SHARED_MEMORY, absent_gpu
from openvsa.ops.backends import triton as triton_kernels


@pytest.fixture(params=SHARED_MEMORY)
def arch(request: pytest.FixtureRequest) -> Iterator[int | str]:
    with absent_gpu(
        request.param, (triton_kernels._forward_kernel, triton_kernels._dq_kernel, triton_kernels._dkv_kernel)
    ):
        yield request.param


def compiled(kernel: str, launch: Any, dtype: torch.dtype, dim: int, mapped: bool) -> Any:
    strides, ints, floats = (32768 * 12 * dim, 12 * dim, dim, 1), torch.int32, torch.float32

    def box(rows: int, columns: int) -> TensorDescriptor | None:
        steps = [strides[0], strides[2], strides[1], 1]
        return (
            TensorDescriptor(torch.empty(1, dtype=dtype), [1, 12, 32768, dim], steps, [1, 1, rows, columns])
            if mapped
            else None
        )

    options = {
        "GROUP": 1, "HEAD_DIM": dim, "BLOCK_D": dim, "MAPPED": mapped,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
        "Q_PIECES": 64 // launch.block_m, "KV_PIECES": 64 // launch.block_n,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    if launch.max_registers is not None:
        options["maxnreg"] = launch.max_registers
    numbers = [512, 64, 32768, 0.1]
    if kernel == "forward":
        half = dim // 2 if launch.half_in_registers else dim
        options["HALF_IN_REGISTERS"] = launch.half_in_registers
        arguments = [*[dtype] * 3, box(launch.block_n, half), box(launch.block_n, dim), dtype, floats]
        arguments += [*[strides] * 4, *[ints] * 4, (0, 1), *numbers]
        return triton_kernels._forward_kernel.warmup(*arguments, grid=(1,), **options)
    if kernel == "dq":
        arguments = [*[dtype] * 3, box(launch.block_n, dim), box(launch.block_n, dim), *[dtype] * 3, *[floats] * 3]
        arguments += [*[strides] * 6, *[ints] * 4, (0, 1), *numbers]
        return triton_kernels._dq_kernel.warmup(*arguments, grid=(1,), **options)
    arguments = [*[dtype] * 4, box(launch.block_m, dim), box(launch.block_m, dim), dtype, dtype, floats, floats]
    arguments += [*[strides] * 6, *[ints] * 4, (0, 1), *numbers]
    return triton_kernels._dkv_kernel.warmup(*arguments, grid=(1,), **options)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 256), (torch.float32, 128), (torch.float32, 256)],
)
def test_by_pointers(arch: int | str, kernel: str, dtype: torch.dtype, dim: int) -> None:
    launch = triton_kernels._BY_POINTERS[kernel][dtype.itemsize, dim]
    assert compiled(kernel, launch, dtype, dim, False).metadata.shared <= SHARED_MEMORY[arch] * 1024


@pytest.mark.parametrize("arch", [90, 100], indirect=True)
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("dim", [64, 128])
def test_by_maps(arch: int, kernel: str, dim: int) -> None:
    launch = triton_kernels._BY_MAPS[kernel][2, dim]
    assert compiled(kernel, launch, torch.bfloat16, dim, True).metadata.shared <= SHARED_MEMORY[arch] * 1024


@pytest.mark.parametrize("arch", [90], indirect=True)
@pytest.mark.parametrize("mapped", [True, False])
def test_three_forward_programs_fit_on_a_hopper_multiprocessor(arch: int, mapped: bool) -> None:
    """228 KiB for all, of which each program takes one for the system."""
    binary = compiled("forward", triton_kernels._HOPPER_FORWARD, torch.bfloat16, 128, mapped)
    assert 3 * (binary.metadata.shared + 1024) <= 228 * 1024
    assert "wgmma" in binary.asm["ptx"]
