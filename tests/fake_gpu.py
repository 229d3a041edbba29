"""A GPU that is not there: tensors on it have shapes, strides and dtypes, and neither memory nor values.

What a model is called with may have values all the same. They follow its small tensors, so that the host reads of them
what is right (lengths of texts, where a lattice is), and each time that it would wait for the device is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from openvsa.layout import device as layout_device

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOST_VALUES = 1 << 21  # numbers of a tensor that has values
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# They enter the device of a tensor before they dispatch, which a torch without CUDA cannot do.
_ENTERING = (
    Tensor.__getitem__, Tensor.__setitem__, Tensor.__invert__, Tensor.contiguous, Tensor.copy_, Tensor.nonzero,
    torch.nonzero,
)  # fmt: skip


@dataclass
class Seen:
    """What a watched step has done.

    ops: each call of an operator of this package: the layer, its name, and the shapes of its tensors.
    waits: each time that the host waited for the device, the layer in which it did; "" outside of all layers.
    largest: bytes of the largest tensor that was made on the GPU.
    peak: the most bytes that all tensors there had at a time, those from before the step included.
    """

    ops: list[tuple[str, str, list[tuple[int, ...]]]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    largest: int = 0
    peak: int = 0


class FakeGPU(TorchDispatchMode):
    """The GPU of `fake_gpu`. `layer`, the one that runs now, is for the caller to set."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes, self.layer, self.seen = fakes, "", Seen()
        self._values: Any = WeakIdKeyDictionary()
        self._held: dict[int, weakref.ref[Any]] = {}
        self._bytes = 0

    def watch(self, step: Callable[[], Any]) -> tuple[Any, Seen]:
        """What a step returns, and what it has done."""
        self.seen = Seen()
        return step(), self.seen

    def put(self, make: Callable[[], Any]) -> Any:
        """What `make` returns with all its tensors on the GPU, where they have values, and no others from before do."""
        self._values.clear()
        with _disable_current_modes():
            made = make()
        return tree_map_only(Tensor, lambda value: self._put(value, GPU), made)

    def _put(self, value: Tensor, device: torch.device) -> Tensor:
        fake = self.fakes.from_tensor(value).to(device)
        self._values[fake] = value
        return fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fakes = self.fakes
        if func is torch.ops.prim.device.default:
            return torch.device("meta") if fakes.in_kernel_invocation else args[0].fake_device
        before, fakes.in_kernel_invocation = fakes.in_kernel_invocation, False
        try:
            return self._run(func, args, kwargs or {})
        finally:
            fakes.in_kernel_invocation = before

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is _aten.index.Tensor:
            args = (args[0], [row for index in args[1] for row in self._rows(index)])
        given = list(_tensors([*args, *kwargs.values()]))
        random = torch.Tag.nondeterministic_seeded in func.tags
        known = func.namespace == "aten" and not random and all(x in self._values for x in given)
        if any(tag in func.tags for tag in _READS) and func is not _aten.index.Tensor:
            self._wait(given[0].device)
            if not known:
                return func(*args, **kwargs)  # raises
            found = self._compute(func, args, kwargs)
            return self._put(found, given[0].device) if isinstance(found, Tensor) else found
        # Nothing is lost by not doing these, whose decompositions enter the device.
        in_place = func is _aten.copy_.default or (random and func._schema.is_mutable)
        out = args[0] if in_place else func(*args, **kwargs)
        made = list(_tensors([out]))
        if made and type(made[0]) is Tensor:  # of a layout, which has real ones on the CPU
            return out
        if func.namespace == "openvsa":
            assert all(x.device == given[0].device for x in given), func  # its fake does not look
            name = func._schema.name.partition("::")[2]
            self.seen.ops.append((self.layer, name, [tuple(x.shape) for x in given]))
        if func is _aten._to_copy.default and made[0].device != given[0].device and not kwargs.get("non_blocking"):
            self._wait(given[0].device, made[0].device)
        for x in made:
            if x.device == GPU:
                self._hold(x.untyped_storage())
        if func is _aten.lift_fresh.default and type(args[0]) is Tensor:
            self._values[out] = args[0]
        elif known and all(x.numel() <= _MOST_VALUES and x.device.type != "meta" for x in made):
            self._values.update(zip(made, _tensors([self._compute(func, args, kwargs)]), strict=True))
        elif func._schema.is_mutable:
            self._values.pop(args[0], None)
        return out

    def _rows(self, index: Tensor | None) -> Iterable[Tensor | None]:
        """An index that is a mask, as the indices of what it keeps."""
        if index is None or index.dtype != torch.bool:
            return (index,)
        return self._run(_aten.unbind.int, (self._run(_aten.nonzero.default, (index,), {}), 1), {})

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        here = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs
        args, here = tree_map_only(Tensor, lambda x: self._values[x], (args, here))
        with _disable_current_modes():
            return func(*args, **here)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def give_back(_: Any) -> None:
            del self._held[key]
            self._bytes -= size

        self._held[key] = weakref.ref(storage, give_back)
        self._bytes += size
        self.seen.largest, self.seen.peak = max(self.seen.largest, size), max(self.seen.peak, self._bytes)

    def _wait(self, *devices: torch.device) -> None:
        if GPU in devices and all(device.type != "meta" for device in devices):
            self.seen.waits.append(self.layer)


class _Functions(TorchFunctionMode):
    """What has to be done before operators see a call."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _dense(**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs)
        fakes, before = self.fakes, self.fakes.in_kernel_invocation
        try:
            fakes.in_kernel_invocation = before or func in _ENTERING  # the device then is called meta
            return func(*args, **kwargs)
        finally:
            fakes.in_kernel_invocation = before


def _dense(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention [B, H, S, D] as by kernels that make no scores of all pairs."""
    like = [(x.dtype, x.device) for x in (query, key, value)]
    assert like[0] == like[1] == like[2]
    if attn_mask is not None:
        pairs = (*query.shape[:-1], key.shape[-2])
        assert attn_mask.device == query.device
        assert torch.broadcast_shapes(attn_mask.shape, pairs) == pairs
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Inside, tensors that are made on `GPU` are of this one, an H200 as far as anyone asks.

    Without gradients, whose nodes enter the device, too: a torch without CUDA then ends the process.
    """
    fakes = FakeTensorMode()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), fakes, FakeGPU(fakes) as gpu, _Functions(fakes):
        patch.setattr(layout_device, "_capability", lambda index: (9, 0))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        yield gpu
