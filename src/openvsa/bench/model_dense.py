"""Dense attention kernels inside a whole model: what sparse attention has to be faster than."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from openvsa.bench.peers import FA4, missing

__all__ = ["DenseBy", "dense_kernels"]

# Of q, k and v [B, H, S, D], as scaled_dot_product_attention takes them.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_kernels(device_type: str) -> tuple[dict[str, Attend], dict[str, tuple[str, ...]]]:
    """By name, those that can be had on this type of device, and why others for it cannot. The first two are always
    there."""
    if device_type != "cuda":
        return {"flash": _sdpa(SDPBackend.FLASH_ATTENTION), "math": _sdpa(SDPBackend.MATH)}, {}
    found = {"cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "flash": _sdpa(SDPBackend.FLASH_ATTENTION)}
    if reasons := missing(FA4):
        return found, {"fa4": reasons}
    return {**found, "fa4": _fa4()}, {}


class DenseBy(TorchFunctionMode):
    """Inside, the self-attention of a model is computed by one dense kernel. Cross-attention, whose keys are not as
    many as its queries, is left alone.

    A mask is dropped: the models measured here have nothing to mask, and kernels are slower with a mask of ones, or
    take none.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            call = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}
            if call["query"].shape[-2] == call["key"].shape[-2]:
                return self.attend(call["query"], call["key"], call["value"])
        if func is Tensor.unflatten:
            # A method written in Python that calls super(), which Dynamo traces only when called as a method.
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v)

    return attend


@cache
def _fa4() -> Attend:
    """FlashAttention-4 as an op of PyTorch's, so that torch.compile does not look into it."""
    flash_attn_func = importlib.import_module(FA4).flash_attn_func

    @torch.library.custom_op("openvsa_bench::fa4", mutates_args=())
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v)
        return found[0] if isinstance(found, tuple) else found

    @op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    return lambda q, k, v: op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
