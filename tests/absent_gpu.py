"""GPUs that are not there, as far as Triton's compiler asks for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# KiB that one program may have (sm_86 as sm_89): CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; for gfx942 the local data share, of the CDNA 3 instruction set manual.
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
TARGETS = {
    arch: GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32) for arch in SHARED_MEMORY
}


class Absent:
    """As much of a GPU's driver as the compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def absent_gpu(arch: int | str, kernels: Iterable[Any]) -> Iterator[None]:
    """Inside, these kernels are compiled for a GPU of that kind; what was compiled before and inside is forgotten."""
    kernels = tuple(kernels)
    for kernel in kernels:
        kernel.device_caches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Absent(TARGETS[arch]))
        yield
    for kernel in kernels:
        kernel.device_caches.clear()
