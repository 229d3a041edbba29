"""Sparse self-attention in Diffusers video transformers, and the way back.

Only public extension points are used: attention processors and a forward pre-hook. The hook reads the lattice from
the latents and the timestep at every forward; nothing is guessed from token counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.config import Budget
from openvsa.errors import BudgetError, OpenVSAError, ShapeError, UnsupportedError, require
from openvsa.integrations.report import AttentionCallback, AttentionEvent, LayerReport, SparsityReport
from openvsa.layout import TileLayout
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, Selector

__all__ = ["SparseHandle", "observe", "sparsify"]


def sparsify(
    model: Any,
    density: float | None = None,
    *,
    budget: Budget | None = None,
    tile: tuple[int, ...] | None = None,
    selector: Selector | None = None,
    backend: str = "auto",
    measure: bool = True,
) -> SparseHandle:
    """Replace the video self-attention of a Diffusers model by sparse attention, in place.

    Cross-attention stays as it is. Any resolution and frame count works, also changing ones. Supported: models built
    on WanTransformer3DModel.

    Args:
        model: a pipeline (its `transformer`, and `transformer_2` where there is one) or a transformer.
        density: the share of key tiles that each query tile keeps, in (0, 1]; short for
            budget=Budget(keep_ratio=density).
        budget: any other budget. Exactly one of density and budget is given.
        tile: tokens of a tile along (T, H, W); None takes TileLayout.fit for each lattice.
        selector: how tiles are chosen; None means PooledTopK().
        backend: as in `openvsa.block_sparse_attention`.
        measure: keep the delivered density and the seconds per layer for `report`. Calls inside torch.compile are
            never measured.

    Returns:
        A handle with `report()`, `density`, `on_attention()` and `detach()`.

    Raises:
        BudgetError: neither or both of density and budget are given, or one is out of range.
        UnsupportedError: the model is of no supported family, or its processors are not the ones it came with.
        OpenVSAError: the model is attached already.
    """
    if (density is None) == (budget is None):
        raise BudgetError(f"give either density or budget, got density={density} and budget={budget}")
    budget = Budget(keep_ratio=density) if budget is None else budget
    return _attach(model, _State(budget, tile, selector or PooledTopK(), backend, measure))


def observe(model: Any, *, tile: tuple[int, ...] | None = None) -> SparseHandle:
    """Attach to a model as `sparsify` does, but leave its attention dense: time it, and show it to callbacks.

    Raises:
        UnsupportedError, OpenVSAError: as in `sparsify`.
    """
    return _attach(model, _State(None, tile, None, "auto", True))


class SparseHandle:
    """The hold that `sparsify` and `observe` keep on a model. Also a context manager that detaches at its end."""

    def __init__(self, state: _State, restore: list[Any]) -> None:
        self._state = state
        self._restore = restore

    @property
    def density(self) -> float | None:
        """The share of key tiles kept, or None if the budget is no share; setting it replaces the budget."""
        return self._state.budget.keep_ratio if self._state.budget else None

    @density.setter
    def density(self, value: float) -> None:
        self.budget = Budget(keep_ratio=value)

    @property
    def budget(self) -> Budget | None:
        """How many key tiles each query tile keeps; None when only observing. May be set at any time."""
        return self._state.budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        if self._state.selector is None:
            raise OpenVSAError("an observed model stays dense: use sparsify to give it a budget")
        self._state.budget = value

    def on_attention(self, callback: AttentionCallback) -> None:
        """Call `callback(event)` after every self-attention (see AttentionEvent). Waits for the device each time."""
        self._state.callbacks.append(callback)

    def report(self) -> SparsityReport:
        """What has run since the model was attached, per layer. Waits for the device."""
        return SparsityReport(tuple(tally.report(self._state.budget) for tally in self._state.tallies.values()))

    def detach(self) -> None:
        """Give the model its own attention back, bit for bit. Doing so twice is harmless."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> SparseHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


@dataclass
class _Tally:
    """What one layer did: sums, so that it stays small however long the model serves."""

    layer: int
    name: str
    layout: TileLayout
    kept: Tensor | float = 0.0
    calls: int = 0
    seconds: float = 0.0
    pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    def count(self, plan: BlockPlan | None) -> None:
        self.calls += 1
        self.kept = self.kept + (1.0 if plan is None else plan.kv_num_blocks.float().mean() / plan.kv_blocks.num_blocks)

    def settle(self, *, wait: bool) -> None:
        """Add up the times of calls that the device has finished; of all calls if `wait`."""
        while self.pending and (wait or self.pending[0][1].query()):
            start, stop = self.pending.popleft()
            stop.synchronize()
            self.seconds += start.elapsed_time(stop) / 1e3

    def report(self, budget: Budget | None) -> LayerReport:
        self.settle(wait=True)
        delivered = float(self.kept) / self.calls
        return LayerReport(
            self.layer, self.name, self.layout.grid, self.layout.tile, self.layout.num_blocks,
            budget.keep_ratio if budget else 1.0, delivered, self.calls, self.seconds,
        )  # fmt: skip


@dataclass
class _State:
    """What all processors of one handle share: the settings, and what the current forward is about."""

    budget: Budget | None
    tile: tuple[int, ...] | None
    selector: Selector | None
    backend: str
    measure: bool
    callbacks: list[AttentionCallback] = field(default_factory=list)
    tallies: dict[int, _Tally] = field(default_factory=dict)
    layout: TileLayout | None = None
    timestep: Tensor | None = None
    _layouts: dict[tuple[int, ...], TileLayout] = field(default_factory=dict)

    def begin_forward(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook of the transformer."""
        latents = args[0] if args else kwargs["hidden_states"]
        self.timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        patch: tuple[int, ...] = tuple(module.config.patch_size)  # type: ignore[union-attr]
        grid = tuple(n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        if grid not in self._layouts:
            layout = TileLayout.fit(grid) if self.tile is None else TileLayout(grid, self.tile)
            self._layouts[grid] = layout.on(latents.device)
        self.layout = self._layouts[grid]


class _WanSelfAttention:
    """A Wan self-attention processor whose attention is that of the shared state.

    Projections, QK-norm and rotary embedding are Wan's: RMS norm over all heads together, then rotation of
    neighbouring channel pairs.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, layer: int, name: str, state: _State) -> None:
        self.layer, self.name, self.state = layer, name, state

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UnsupportedError(
                f"{self.name} got encoder states or an attention mask; only plain video self-attention can be sparse",
                {},
            )
        if self._parallel_config is not None:
            raise UnsupportedError(f"{self.name} runs under context parallelism, which is not supported yet", {})
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # Under autocast the norms return fp32.
        q, k = attn.norm_q(q).type_as(v), attn.norm_k(k).type_as(v)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        out = self._measured(q, k, v).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, BlockPlan | None, Tensor, Tensor]:
        """Raster order in and out; also the plan, and q and k as the plan saw them."""
        state, layout = self.state, self.state.layout
        if layout is None:
            raise OpenVSAError(f"{self.name} ran outside its transformer's forward, so its lattice is not known")
        layout.check("the input of a self-attention", q.shape[1])
        if state.selector is None or state.budget is None:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            return dispatch_attention_fn(q, k, v, backend=self._attention_backend), None, q, k
        q, k, v = layout.permute(q), layout.permute(k), layout.permute(v)
        plan = state.selector(q, k, layout, state.budget)
        out = block_sparse_attention(q, k, v, plan, backend=state.backend)
        return layout.unpermute(out), plan, q, k

    def _measured(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = self.state
        if torch.compiler.is_compiling() or not (state.measure or state.callbacks):
            return self._attend(q, k, v)[0]
        on_gpu = q.device.type == "cuda"
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if on_gpu else None
        if events:
            events[0].record()
        start = time.perf_counter()
        out, plan, q, k = self._attend(q, k, v)
        seconds = time.perf_counter() - start
        layout = state.layout
        assert layout is not None
        if events:
            events[1].record()
        tally = state.tallies.setdefault(self.layer, _Tally(self.layer, self.name, layout))
        tally.layout = layout
        tally.count(plan)
        if events:
            tally.pending.append(events)
            tally.settle(wait=False)
        else:
            tally.seconds += seconds
        if state.callbacks:
            self._tell(layout, plan, q, k, seconds, events)
        return out

    def _tell(
        self,
        layout: TileLayout,
        plan: BlockPlan | None,
        q: Tensor,
        k: Tensor,
        seconds: float,
        events: tuple[torch.cuda.Event, torch.cuda.Event] | None,
    ) -> None:
        if events:
            events[1].synchronize()
            seconds = events[0].elapsed_time(events[1]) / 1e3
        if plan is None:
            q, k = layout.permute(q), layout.permute(k)
        timestep = self.state.timestep
        when = float(timestep.reshape(-1)[0]) if timestep is not None else float("nan")
        event = AttentionEvent(self.layer, self.name, when, layout, plan, q.detach(), k.detach(), seconds)
        for callback in self.state.callbacks:
            callback(event)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def _attach(model: Any, state: _State) -> SparseHandle:
    transformers = _transformers(model)
    wan = require("diffusers.models.transformers.transformer_wan", extra="diffusers")
    chosen: list[tuple[Any, str]] = []
    for transformer in transformers:
        if not isinstance(transformer, wan.WanTransformer3DModel):
            raise UnsupportedError(
                f"{type(transformer).__name__} is of no supported family; supported: WanTransformer3DModel", {}
            )
        for index, block in enumerate(transformer.blocks):
            name = f"blocks.{index}.attn1"
            processor = block.attn1.processor
            if isinstance(processor, _WanSelfAttention):
                raise OpenVSAError(f"{name} is attached already: detach its handle first, or set that handle's density")
            if type(processor) is not wan.WanAttnProcessor:
                raise UnsupportedError(
                    f"{name} has the processor {type(processor).__name__}, which would be lost; restore Wan's own "
                    "processor first",
                    {},
                )
            chosen.append((block.attn1, name))
    restore: list[Any] = []
    for layer, (attn, name) in enumerate(chosen):
        restore.append(_undo(attn, attn.processor))
        attn.set_processor(_WanSelfAttention(layer, name, state))
    for transformer in transformers:
        restore.append(transformer.register_forward_pre_hook(state.begin_forward, with_kwargs=True).remove)
    return SparseHandle(state, restore)


def _undo(attn: Any, processor: Any) -> Any:
    return lambda: attn.set_processor(processor)


def _transformers(model: Any) -> list[Any]:
    if isinstance(model, nn.Module):
        return [model]
    found = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    found = [transformer for transformer in found if transformer is not None]
    if not found:
        raise ShapeError(
            f"expected a Diffusers pipeline with a transformer, or a transformer, got {type(model).__name__}"
        )
    return found
