"""Operators of torch.library that take the host little time to call.

`torch.library.custom_op` makes the same (one node for torch.compile, fakes, gradients, Dynamo kept out of the kernel),
but takes twice as long for each call, of which video sparse attention makes several in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["torch_op"]

_LIBRARY = torch.library.Library("openvsa", "FRAGMENT")


def torch_op(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operator openvsa::`name` and return it; it takes positional arguments only.

    Args:
        kernel: what it does, on any device. Annotated with the types that `torch.library.infer_schema` knows. Its
            results are new tensors, and its arguments are left as they are.
        fake: the same for shapes and dtypes alone.
        save, differentiate: `setup_context` and `backward` of `torch.library.register_autograd`; None for an operator
            without gradients.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"openvsa::{name}"
    torch.library.register_kernel(qualified, None, kernel, lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.openvsa, name).default
    if save is None or differentiate is None:
        return op

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    Differentiable.__name__ = f"{name}_with_gradient"

    def with_gradient(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Differentiable.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _LIBRARY.impl(name, with_gradient, "Autograd")
    return op
