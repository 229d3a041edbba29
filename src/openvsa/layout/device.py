"""What names a device, and which tensors the Triton kernels of layout, plan and select take.

The rule for kernels, in one place: fp32, fp16 and bf16 tensors on a GPU that Triton supports (for plans, whose lists
are integers, the device alone decides). Everything else, fp64 and CPU tensors in particular, runs the plain torch code
beside each kernel, which means the same; tests compare the two. With Triton's interpreter on, CPU tensors go to the
kernels too.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from openvsa import config
from openvsa.errors import ShapeError

__all__ = ["as_device", "has_kernels", "kernels_on"]

# Asked once: neither can change while a process runs, and Dynamo must not look for packages.
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = config.triton_interpret()
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def as_device(device: torch.device | str) -> torch.device:
    """What `device` names. Raises ShapeError if it names none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ShapeError(
            f"device must be a torch.device or the name of one, such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error


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
