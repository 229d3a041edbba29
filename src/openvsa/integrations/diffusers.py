"""Sparse self-attention in Diffusers models, and the way back.

Only public extension points are used: attention processors, forward hooks, and a TorchFunctionMode around the model's
own processor. The hooks read the lattice, the timestep and the branch of guidance at every forward; nothing is guessed
from token counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from openvsa.config import Budget
from openvsa.errors import BudgetError, OpenVSAError, UnsupportedError
from openvsa.integrations.branch import LearnedBranch, check_settings, warn_without_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.families import Family, family_of
from openvsa.integrations.intercept import SparseProcessor, wrap
from openvsa.integrations.report import AttentionCallback, SparsityReport
from openvsa.integrations.session import Session
from openvsa.integrations.site import Site
from openvsa.integrations.steps import weakly
from openvsa.select import BudgetTable, PooledTopK, Selector

__all__ = ["SparseHandle", "SparsityConfig", "observe", "sparsify"]


def sparsify(
    model: Any,
    density: float | None = None,
    *,
    budget: Budget | BudgetTable | str | PathLike[str] | None = None,
    tile: tuple[int, ...] | None = None,
    selector: Selector | None = None,
    backend: str = "auto",
    min_tokens: int | None = None,
    config: SparsityConfig | None = None,
    measure: bool = True,
) -> SparseHandle:
    """Replace the video self-attention of a Diffusers model by sparse attention, in place.

    Cross-attention stays as it is, and so do the rows and columns of text. Any resolution and frame count works, also
    changing ones. `openvsa.integrations.families.supported()` names the transformers that can be sparse. A model with
    branch weights (see `openvsa.integrations.branch`) gets its compressed branch in every sparse call.

    Args:
        model: a pipeline (its `transformer`, and `transformer_2` where there is one) or a transformer.
        density: the share of key tiles that each query tile keeps, in (0, 1]; short for
            budget=Budget(keep_ratio=density).
        budget: any other budget; a BudgetTable, or the file of one that `openvsa audit --budget` has written.
        tile: tokens of a tile along each axis of the lattice; None takes TileLayout.fit for each lattice.
        selector: how tiles are chosen; None means PooledTopK().
        backend: as in `openvsa.block_sparse_attention`.
        min_tokens: a sequence of fewer tokens stays dense. None: where sparse attention is not expected to be faster
            (see `openvsa.integrations.break_even`); 0: never.
        config: all of these and more as one SparsityConfig. Give it alone, or give one of density and budget.
        measure: keep densities and seconds per layer for `report`. Calls inside torch.compile are never measured.

    Returns:
        A handle with `report()`, `density`, `config`, `on_attention()` and `detach()`.

    Raises:
        BudgetError: not exactly one of density, budget and config is given, or a number is out of range.
        UnsupportedError: the model is of no supported family.
        OpenVSAError: the model is attached already.
    """
    if [density, budget, config].count(None) != 2 or (
        config and (tile or selector or backend != "auto" or min_tokens is not None)
    ):
        raise BudgetError(
            f"give either density or budget or config, got density={density}, budget={budget} and config={config}; "
            "tile, selector, backend and min_tokens are part of a config"
        )
    if config is not None and not isinstance(config, SparsityConfig):
        raise OpenVSAError(
            f"config must be a SparsityConfig, got {config!r}; SparsityConfig.from_dict, .load and .preset make one"
        )
    if config is None:
        given: dict[str, Any] = {"selector": selector or PooledTopK(), "backend": backend, "min_tokens": min_tokens}
        if tile is not None:
            given["tile"] = tile
        table = BudgetTable.load(budget) if isinstance(budget, str | PathLike) else budget
        if isinstance(table, BudgetTable):
            config = SparsityConfig.of_table(table, **given)
        else:
            config = SparsityConfig(density=density, budget=table, **given)
    return _attach(model, config, measure=measure)


def observe(model: Any, *, tile: tuple[int, ...] | None = None) -> SparseHandle:
    """Attach to a model as `sparsify` does, but leave its attention dense: time it, and show it to callbacks.

    Raises:
        UnsupportedError, OpenVSAError: as in `sparsify`.
    """
    return _attach(model, None, tile=tile)


def _attach(
    model: Any,
    config: SparsityConfig | None,
    *,
    tile: tuple[int, ...] | None = None,
    measure: bool = True,
) -> SparseHandle:
    """What `sparsify` and `observe` do (config None: observe, in tiles of `tile`).

    Raises:
        UnsupportedError, OpenVSAError: as in `sparsify`.
    """
    session = Session(config, tile, measure, pipeline=weakly(model))
    found: list[tuple[Any, Family, list[tuple[nn.Module, SparseProcessor]]]] = []
    names: list[str] = []
    for part, transformer in _transformers(model):
        family = family_of(transformer)
        layers = []
        for name, attn in family.attentions(transformer):
            name = part + name
            layers.append((attn, wrap(attn.processor, len(names), name, family, session)))
            names.append(name)
        found.append((transformer, family, layers))
        session.branch = LearnedBranch.of([attn for attn, _ in layers]) or session.branch
    # Everything that can be wrong is found before the model is changed.
    sites = [
        Site(session, family, transformer, layers, family.hoist(transformer)) for transformer, family, layers in found
    ]
    _settle(session, sites, names, config)
    restore: list[Callable[[], None]] = []
    for site, (transformer, _, layers) in zip(sites, found, strict=True):
        for attn, processor in layers:
            _set_processor(attn, processor)
            restore.append(partial(_restore, attn, processor))
        restore.append(transformer.register_forward_pre_hook(site.begin_forward, with_kwargs=True).remove)
        restore.append(transformer.register_forward_hook(site.end_forward).remove)
        if config is not None and site.hoist is not None:
            for module, first, last in site.hoist.entries:
                restore.append(module.register_forward_hook(partial(site.enter, first=first, last=last)).remove)
            restore.append(site.hoist.exit[0].register_forward_hook(site.leave).remove)
    return SparseHandle(session, sites, names, restore)


class SparseHandle:
    """The hold that `sparsify` and `observe` keep on a model. Also a context manager that detaches at its end."""

    def __init__(
        self, session: Session, sites: list[Site], names: list[str], restore: list[Callable[[], None]]
    ) -> None:
        self._session, self._sites, self._names, self._restore = session, sites, names, restore

    @property
    def config(self) -> SparsityConfig | None:
        """The settings; None when only observing. May be set at any time, and hold from the next forward on.

        Raises:
            OpenVSAError: the model is only observed, or the settings do not fit it.
        """
        return self._session.config

    @config.setter
    def config(self, value: SparsityConfig) -> None:
        if self._session.config is None:
            raise OpenVSAError("an observed model stays dense: use sparsify to give it a budget")
        if not isinstance(value, SparsityConfig):
            raise OpenVSAError(f"config must be a SparsityConfig, got {value!r}")
        _settle(self._session, self._sites, self._names, value)

    @property
    def density(self) -> float | None:
        """The share of key tiles kept, or None if the budget is no share; setting it replaces the budget."""
        return self.budget.keep_ratio if self.budget else None

    @density.setter
    def density(self, value: float) -> None:
        self.budget = Budget(keep_ratio=value)

    @property
    def budget(self) -> Budget | None:
        """How many key tiles each query tile keeps; None when only observing. May be set at any time."""
        return self.config.base if self.config else None

    @budget.setter
    def budget(self, value: Budget) -> None:
        if self.config is None:
            raise OpenVSAError("an observed model stays dense: use sparsify to give it a budget")
        if set(self._names) <= set(self.config.layers):
            raise BudgetError(
                "every layer has a density of its own (config.layers), so another budget would change nothing; set "
                "handle.config, or detach and sparsify again"
            )
        self.config = dataclasses.replace(self.config, density=None, budget=value)

    def on_attention(self, callback: AttentionCallback) -> None:
        """Call `callback(event)` after every self-attention (see AttentionEvent). Waits for the device each time.

        The callback may set other settings, which hold from the next forward on, but neither run the model nor detach.
        """
        self._session.callbacks.append(callback)

    def report(self) -> SparsityReport:
        """What has run since the model was attached, per layer. Waits for the device."""
        return SparsityReport(tuple(self._session.tallies[layer].report() for layer in sorted(self._session.tallies)))

    def detach(self) -> None:
        """Give the model its own attention back, bit for bit. Doing so twice is harmless.

        Raises:
            OpenVSAError: an `on_attention` callback does so, in the middle of a forward.
        """
        self._session.check_not_telling("detach")
        while self._restore:
            self._restore.pop()()
        self._session.plans.clear()
        self._session.forward, self._sites = None, []  # a report is about the model, but does not keep it

    def __enter__(self) -> SparseHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _settle(session: Session, sites: list[Site], names: list[str], config: SparsityConfig | None) -> None:
    """Put settings into force, after checking that they fit the model."""
    if config is not None:
        dense = config.check_layers(names)
        check_settings(config, session.branch is not None)
        # Some schedulers have timesteps only when a generation has begun.
        if config.dense_last_steps and not hasattr(getattr(session.pipeline(), "scheduler", None), "timesteps"):
            raise UnsupportedError(
                "dense_last_steps needs to know how many steps there are: give sparsify the pipeline, whose scheduler "
                "has the timesteps, not its transformer"
            )
        for site in sites:
            heads, _ = site.family.heads(site.transformer)
            for processor in site.processors:
                shares = config.layers.get(processor.name)
                if isinstance(shares, tuple) and len(shares) != heads:
                    raise BudgetError(
                        f"{processor.name} has {heads} heads, but the settings have {len(shares)} densities for it"
                    )
        for site in sites:
            site.dense_layers = dense
            warn_without_branch(config, [attn for attn, _ in site.attentions])
    session.config = config
    session.plans.clear()


def _set_processor(attn: Any, processor: Any) -> None:
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:  # Mochi's attention has only the attribute
        attn.processor = processor


def _restore(attn: Any, processor: SparseProcessor) -> None:
    """Someone may have put another processor in place, perhaps around ours: then ours only steps aside."""
    processor.attached = False
    if attn.processor is processor:
        _set_processor(attn, processor.inner)


def _transformers(model: Any) -> list[tuple[str, Any]]:
    """The transformers of a model, each with what goes before the names of its layers. Of what torch.compile has
    wrapped, the model inside."""
    if isinstance(model, nn.Module):
        return [("", getattr(model, "_orig_mod", model))]
    found = [
        (prefix, getattr(model, name, None))
        for prefix, name in (("", "transformer"), ("transformer_2.", "transformer_2"))
    ]
    found = [(prefix, getattr(one, "_orig_mod", one)) for prefix, one in found if one is not None]
    if len(found) == 2 and found[0][1] is found[1][1]:  # one model for all noise levels
        found.pop()
    if not found and hasattr(model, "transformer"):
        raise OpenVSAError(
            f"the transformer of this {type(model).__name__} is not there yet: load it first (load_components(), for a "
            "modular pipeline)"
        )
    if not found:
        raise UnsupportedError(
            f"expected a Diffusers pipeline with a transformer, or a transformer, got {type(model).__name__}"
        )
    return found
