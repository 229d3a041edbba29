"""Operators that run as plain functions unless someone watches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from openvsa.errors import UnsupportedError
from openvsa.torch_op import torch_op

CALLS: list[int] = []
_NUMBER = itertools.count()


def _scaled(x: Tensor, other: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """x * scale, and its sum."""
    CALLS.append(next(_NUMBER))
    y = x * scale
    return y, y.sum()


def _fake_scaled(x: Tensor, other: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.scale = inputs[2]


def _differentiate(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Any, ...]:
    return (grad + grad_sum) * ctx.scale, None, None


scaled = torch_op("test_scaled", _scaled, _fake_scaled, save=_save, differentiate=_differentiate)
plain = torch_op("test_plain", _scaled, _fake_scaled)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_same_with_and_without_a_watcher(requires_grad: bool) -> None:
    x = torch.randn(3, requires_grad=requires_grad)
    y, total = scaled(x, None, 2.0)
    with Seen() as seen:
        same, same_total = scaled(x, None, 2.0)
    assert seen.names.count("openvsa::test_scaled") == 1
    assert torch.equal(y, same)
    assert torch.equal(total, same_total)
    assert y.requires_grad == same.requires_grad == requires_grad
    if requires_grad:
        for outputs in ((y, total), (same, same_total)):
            (grad,) = torch.autograd.grad(outputs, x, [torch.ones(3), torch.ones(())])
            assert torch.equal(grad, torch.full((3,), 4.0))


def test_an_operator_without_gradient() -> None:
    y, _ = plain(torch.randn(3), None, 3.0)
    assert not y.requires_grad
    with Seen() as seen:
        plain(torch.randn(3), None, 3.0)
    assert "openvsa::test_plain" in seen.names


def test_fakes_and_subclasses_go_through_the_operator() -> None:
    before = len(CALLS)
    with FakeTensorMode():
        y, total = scaled(torch.empty(5, requires_grad=True), None, 2.0)
    assert (y.shape, total.shape, len(CALLS)) == ((5,), (), before)
    y, _ = scaled(torch.randn(3).as_subclass(Subclass), None, 2.0)
    assert isinstance(y, Tensor)


def test_no_gradient_where_none_is_wanted() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not scaled(x, None, 2.0)[0].requires_grad
    with torch.inference_mode():
        assert scaled(x, None, 2.0)[0].is_inference()


def test_compiles_in_one_graph() -> None:
    x = torch.randn(3, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        y, total = scaled(x, None, 2.0)
        return y * total

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, f(x))
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(f(x).sum(), x))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.openvsa.test_scaled.default, (torch.randn(3, requires_grad=True), None, 2.0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_the_operator() -> None:
    x = torch.randn(4, 3)
    y, total = torch.func.vmap(lambda x: scaled(x, None, 2.0))(x)
    torch.testing.assert_close(y, 2 * x)
    torch.testing.assert_close(total, 2 * x.sum(-1))


def test_a_gradient_of_an_operator_without_one_is_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    for y in (plain(x, None, 2.0)[0], torch.ops.openvsa.test_plain(x, None, 2.0)[0]):
        with pytest.raises(UnsupportedError, match=r"openvsa::test_plain has no derivative.*'reference'"):
            (y.sum() + x.sum()).backward()


def test_a_forward_mode_derivative_is_refused() -> None:
    x, tangent = torch.randn(3), torch.ones(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with pytest.raises(UnsupportedError, match="openvsa::test_scaled has no forward-mode derivative"):
            scaled(dual, None, 2.0)
        assert torch.equal(scaled(x, None, 2.0)[0], 2 * x)
    with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: scaled(x, None, 2.0)[0], (x,), (tangent,))


def test_gradients_of_torch_func_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated by torch\.func"):
        torch.func.grad(lambda x: scaled(x, None, 2.0)[1])(torch.randn(3))
