"""Which tensors the Triton kernels of layout, plan and select take, and which ones can be read or kept.

The rule, in one place: fp32, fp16 and bf16 tensors on a GPU that Triton supports (for plans, whose lists are integers,
the device alone decides). Everything else, fp64 and CPU tensors in particular, runs the plain torch code beside each
kernel, which means the same; tests compare the two. With Triton's interpreter on, CPU tensors go to the kernels too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from openvsa import config

__all__ = ["as_computed_here", "build_to_keep", "can_keep", "has_kernels", "kernels_on", "values_known"]

# Asked once: neither can change while a process runs, and Dynamo must not look for packages.
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = config.triton_interpret()
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernels(*tensors: Tensor) -> bool:
    """Whether all of `tensors`, which are on one device, go to Triton kernels."""
    return all(x.dtype in _DTYPES for x in tensors) and kernels_on(tensors[0].device)


def kernels_on(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`."""
    if not _TRITON or device.type not in ("cpu", "cuda"):
        return False
    return _INTERPRETED if device.type == "cpu" else _gpu_is_new_enough(device.index)


@config.machine_fact
def _gpu_is_new_enough(index: int | None) -> bool:
    if torch.version.hip is not None:
        return True
    return _capability(torch.cuda.current_device() if index is None else index) >= (8, 0)


@cache  # every call of attention asks several times
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def values_known(x: Tensor) -> bool:
    """Whether the numbers in `x` can be looked at at once: on the CPU, unless they are being compiled or are fake."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


# Tensors that are made once and kept may be asked for first inside inference mode or FakeTensorMode, and later outside.


def build_to_keep(build: Callable[[], Tensor]) -> Tensor:
    """The tensor on the CPU that `build` makes, fit for any use: training, too."""
    if torch.compiler.is_compiling():  # Dynamo has modes of its own
        with torch.inference_mode(False):
            return build()
    with torch.inference_mode(False), unset_fake_temporarily():
        return build()


def can_keep(x: Tensor) -> bool:
    """Whether a copy on another device may be kept for later calls."""
    return not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def as_computed_here(x: Tensor) -> Tensor:
    """A tensor that was kept, as one of the FakeTensorMode that may be on."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return x
    mode = active_fake_mode()
    if mode is None or mode.allow_non_fake_inputs or isinstance(x, FakeTensor):
        return x
    return mode.from_tensor(x)
