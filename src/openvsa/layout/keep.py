"""Tensors that are made once and kept, and whether their numbers can be looked at.

They may be asked for first inside inference mode, FakeTensorMode or torch.compile, and later outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

__all__ = ["as_computed_here", "build_to_keep", "can_keep", "fakes_are_on", "values_known"]


def values_known(x: Tensor) -> bool:
    """Whether the numbers in `x` can be looked at at once: on the CPU, unless they are being compiled or are fake."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def build_to_keep(build: Callable[[], Tensor]) -> Tensor:
    """The tensor on the CPU that `build` makes, fit for any use: training, too."""
    if torch.compiler.is_dynamo_compiling():  # it has modes of its own
        with torch.inference_mode(False):
            return build()
    with torch.inference_mode(False), unset_fake_temporarily():
        return build()


def can_keep(x: Tensor) -> bool:
    """Whether a copy on another device may be kept for later calls: not one that Dynamo traces, which is made in every
    call. What Dynamo calls while it traces (see `config.machine_fact`) makes copies like any other code."""
    return not torch.compiler.is_dynamo_compiling() and not isinstance(x, FakeTensor)


def fakes_are_on() -> bool:
    """Whether what is computed now has no values: inside FakeTensorMode."""
    return bool(torch._C._len_torch_dispatch_stack()) and active_fake_mode() is not None


def as_computed_here(x: Tensor) -> Tensor:
    """A tensor that was kept, as one of the FakeTensorMode that may be on."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return x
    mode = active_fake_mode()
    if mode is None or mode.allow_non_fake_inputs or isinstance(x, FakeTensor):
        return x
    return mode.from_tensor(x)
