"""Comparing Triton kernels with the plain torch code that means the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from helpers import DEVICE
from openvsa.layout import device

T = TypeVar("T")


def both(run: Callable[[], T]) -> tuple[T, T]:
    """What `run` gives with kernels and with plain code, from the same random numbers."""
    assert device.kernels_on(DEVICE), "the kernels do not run here, so there is nothing to compare"
    torch.manual_seed(1)
    with_kernels = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_TRITON", False)
        assert not device.kernels_on(DEVICE)
        torch.manual_seed(1)
        return with_kernels, run()
