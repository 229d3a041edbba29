"""Operators of torch.library that take the host little time to call.

What `torch.library.custom_op` makes is the same to torch.compile and to everything else that watches operators (one
node, with a fake and gradients), but each call takes the host some 12 microseconds, or 25 with gradients, and video
sparse attention makes several in every layer. Here an eager call that nobody watches runs the kernel as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.autograd import forward_ad
from torch.nn import Parameter

from openvsa.errors import UnsupportedError

__all__ = ["check_not_traced", "check_visible", "is_transformed", "torch_op"]

_LIBRARY = torch.library.Library("openvsa", "FRAGMENT")


def torch_op(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operator torch.ops.openvsa.`name` and return what calls it, with positional arguments only.

    Args:
        kernel: what it does, on any device. Annotated with the types that `torch.library.infer_schema` knows. Its
            results are new tensors, and its arguments are left as they are.
        fake: the same for shapes and dtypes alone.
        save, differentiate: `setup_context` and `backward` of `torch.library.register_autograd`; None for an operator
            without gradients.

    What no formula is known for is refused, where PyTorch would leave it out of the result: gradients of an operator
    without any (of a gradient of attention, say), forward-mode derivatives, and those of torch.func. UnsupportedError
    says so.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"openvsa::{name}"
    torch.library.register_kernel(qualified, None, kernel, lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.openvsa, name).default

    def no_gradient(ctx: Any, *grads: Any) -> NoReturn:
        _refuse(qualified, "has no derivative", "where gradients of gradients are wanted, pass backend='reference'")

    save, differentiate = save or (lambda ctx, inputs, output: None), differentiate or no_gradient

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    watched = _with_gradient(name, below_autograd, save, differentiate)
    eager = _with_gradient(name, kernel, save, differentiate)

    def above_autograd(*args: Any) -> Any:
        if _has_tangent(args):
            _refuse(qualified, "has no forward-mode derivative", "differentiate backward instead")
        if not _needs_gradient(args):
            return below_autograd(*args)
        if peek_interpreter_stack() is not None:
            _refuse(qualified, "cannot be differentiated by torch.func", "use torch.autograd.grad or .backward()")
        return watched.apply(*args)

    _LIBRARY.impl(name, above_autograd, "Autograd")

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args):
            return op(*args)
        if _needs_gradient(args):
            return eager.apply(*args)
        return kernel(*args)

    return call


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. They know PyTorch's own operators alone."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def check_visible(what: str) -> None:
    """Refuse to run under what cannot see through `what`, rather than let it leave out a part of the result.

    Raises:
        UnsupportedError: inside torch.func, forward-mode differentiation or torch.jit.trace.
    """
    if torch.compiler.is_compiling():
        return
    if is_transformed():
        raise UnsupportedError(
            f"torch.func and forward-mode differentiation cannot see through {what}; use torch.autograd.grad or "
            ".backward()", {},
        )  # fmt: skip
    check_not_traced(what)


def check_not_traced(what: str) -> None:
    """Refuse torch.jit.trace, which would keep the result of one run as a constant.

    Raises:
        UnsupportedError: inside torch.jit.trace.
    """
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise UnsupportedError(f"torch.jit.trace cannot see through {what}; use torch.export or torch.compile")


def _refuse(qualified: str, what: str, instead: str) -> NoReturn:
    raise UnsupportedError(f"the operator {qualified} {what}; {instead}")


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _has_tangent(args: tuple[Any, ...]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether someone wants to see the operator: a mode (checkpointing by operator, fakes, ...), a transform such as
    vmap, forward-mode differentiation, or a tensor of another class."""
    if torch._C._len_torch_dispatch_stack() or is_transformed():
        return True
    for x in args:  # noqa: SIM110 - a generator takes longer, and this runs in every call
        if isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not Parameter:
            return True
    return False


def _with_gradient(
    name: str, run: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        save(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(f"{name}_with_gradient", (torch.autograd.Function,), methods)
