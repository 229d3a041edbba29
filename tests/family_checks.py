"""What must hold for every model family, on a tiny transformer with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openvsa
from openvsa.integrations.diffusers import observe
from openvsa.integrations.families import family_of
from openvsa.integrations.report import AttentionEvent

Run = Callable[..., Tensor]
"""run(model, grid, samples=(0, 1)): the video output; sample i has latents and text of its own."""


def close(ours: Tensor, dense: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=atol)


def check_density_one(model: nn.Module, run: Run, grids: list[tuple[int, ...]], atol: float = 1e-5) -> None:
    """Also: one lattice after the other, and back."""
    dense = {grid: run(model, grid) for grid in grids}
    assert all(out.isfinite().all() and out.std() > 0 for out in dense.values())
    with openvsa.sparsify(model, density=1.0):
        for grid in [*grids, grids[0]]:
            close(run(model, grid), dense[grid], atol)


def check_detach(model: nn.Module, run: Run, grid: tuple[int, ...]) -> None:
    before = processors(model)
    dense = run(model, grid)
    handle = openvsa.sparsify(model, density=0.2)
    assert not torch.equal(run(model, grid), dense), "attention was not sparse"
    handle.detach()
    assert processors(model) == before
    assert torch.equal(run(model, grid), dense)


def check_guidance(model: nn.Module, run: Run, grid: tuple[int, ...], atol: float = 1e-5) -> None:
    """Both branches of guidance in one batch give what they give one after the other."""
    with openvsa.sparsify(model, density=0.4):
        batched = run(model, grid, samples=(0, 1))
        split = torch.cat([run(model, grid, samples=(0,)), run(model, grid, samples=(1,))])
    assert not torch.allclose(batched[0], batched[1])
    close(split, batched, atol)


def check_only_these_are_sparse(model: nn.Module, run: Run, grid: tuple[int, ...], names: list[str]) -> None:
    """The named modules are wrapped and run once each, on the lattice; every other processor is left alone."""
    before = processors(model)
    with openvsa.sparsify(model, density=0.4) as handle:
        changed = {name for name, processor in processors(model).items() if processor is not before[name]}
        run(model, grid)
        layers = handle.report().layers
    assert changed == set(names)
    assert [layer.name for layer in layers] == names
    assert {(layer.grid, layer.calls) for layer in layers} == {(grid, 1)}
    assert all(layer.delivered_density < 1 for layer in layers)


def check_hoist(model: nn.Module, run: Callable[[], Tensor], atol: float = 1e-5) -> None:
    """The order of tokens changes once for all layers, which gives what a change in every layer gives."""
    family, permute = type(family_of(model)), openvsa.TileLayout.permute
    assert family_of(model).hoist(model) is not None
    calls: list[int] = []

    def counted(self: openvsa.TileLayout, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.shape[1])
        return permute(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvsa.TileLayout, "permute", counted)
        with openvsa.sparsify(model, density=0.4) as handle:
            hoisted = run()
            assert handle._session.forward.hoisted
        once = len(calls)
        patch.setattr(family, "hoist", lambda self, transformer: None)
        with openvsa.sparsify(model, density=0.4):
            close(run(), hoisted, atol)
        assert len(calls) - once == 3 * len(family_of(model).attentions(model)), "queries, keys, values in each layer"


def check_contract(model: nn.Module, run: Run, grid: tuple[int, ...], processor: str, forward: set[str]) -> None:
    """What we rely on in Diffusers: names of the forward's arguments, the processors' class, and that each video
    self-attention makes one call of scaled_dot_product_attention over the whole sequence."""
    family = family_of(model)
    attentions = family.attentions(model)
    assert {type(module.processor).__name__ for _, module in attentions} == {processor}
    assert forward <= set(torch_parameters(model))
    with counted_attention(module for _, module in attentions) as calls:
        run(model, grid)
    assert calls == [1] * len(attentions)


def events_of(model: nn.Module, run: Callable[[], Any], **options: Any) -> list[AttentionEvent]:
    found: list[AttentionEvent] = []
    with openvsa.sparsify(model, **options) if options else observe(model) as handle:
        handle.on_attention(found.append)
        run()
    return found


def check_conditioning_is_dense(event: AttentionEvent, prefix: int, suffix: int) -> None:
    """Tokens around the lattice read every block, and every block reads them."""
    layout, plan = event.layout, event.plan
    assert plan is not None
    assert (layout.prefix, layout.suffix) == (prefix, suffix)
    mask, tiles = plan.block_mask(), layout.tile_blocks
    text = torch.ones(layout.num_blocks, dtype=torch.bool)
    text[tiles] = False
    assert text.any()
    assert mask[..., text, :].all()
    assert mask[..., :, text].all()
    assert not mask[..., tiles, tiles].all()


def processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def torch_parameters(model: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(type(model).forward).parameters)


@contextmanager
def counted_attention(modules: Iterator[nn.Module]) -> Iterator[list[int]]:
    """Calls of scaled_dot_product_attention with equally many queries and keys, inside each module in turn."""

    class Count(torch.overrides.TorchFunctionMode):
        inside = False

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is nn.functional.scaled_dot_product_attention and self.inside:
                q, k = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(("query", "key")))
                calls[-1] += q.shape[2] == k.shape[2]
            return function(*args, **kwargs)

    mode, calls = Count(), []

    def enter(*_: Any) -> None:
        mode.inside = True
        calls.append(0)

    def leave(*_: Any) -> None:
        mode.inside = False

    handles = [h for m in modules for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with mode:
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def randoms(samples: tuple[int, ...], *shape: int, salt: int = 0) -> Tensor:
    """[len(samples), *shape]; a sample's numbers depend on its own number alone."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(100 * salt + sample)) for sample in samples]
    )
