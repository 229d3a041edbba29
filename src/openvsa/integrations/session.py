"""What one handle holds of a model: its settings, what the current forward is about, and what has been done."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvsa.config import Budget
from openvsa.errors import OpenVSAError, ShapeError
from openvsa.integrations.branch import LearnedBranch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.families import Sequence
from openvsa.integrations.forward import Forward, Part
from openvsa.integrations.intercept import SparseProcessor, raise_unsupported
from openvsa.integrations.report import AttentionCallback, AttentionEvent
from openvsa.integrations.reuse import KeptPlans
from openvsa.integrations.steps import StepClock, weakly
from openvsa.integrations.tally import Clock, Tally
from openvsa.layout import TileLayout
from openvsa.layout.keep import fakes_are_on
from openvsa.layout.shelf import kept_layout
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, select_by_head
from openvsa.select.pool import permute_pool_all

__all__ = ["Session", "captures_graph"]


def captures_graph() -> bool:
    """Whether this forward becomes a CUDA graph, whose replays run none of this code."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass
class Session:
    """Settings None: the model is only watched, and stays dense."""

    config: SparsityConfig | None
    tile: tuple[int, ...] | None
    measure: bool
    branch: LearnedBranch | None = None
    pipeline: Callable[[], Any] = lambda: None
    callbacks: list[AttentionCallback] = field(default_factory=list)
    tallies: dict[int, Tally] = field(default_factory=dict)
    forward: Forward | None = None
    clock: StepClock = field(default_factory=StepClock)
    plans: KeptPlans = field(default_factory=KeptPlans)
    telling: bool = False  # callbacks are being called, in the middle of a forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # Settings are copied. What has run stays behind: it may hold events of a GPU and tensors that know no copy.
        twin = memo[id(self)] = Session(self.config, self.tile, self.measure, self.branch, self.pipeline)
        twin.callbacks = copy.deepcopy(self.callbacks, memo)
        model = self.pipeline()
        if id(model) in memo:  # a pipeline is copied, whose scheduler counts for its own transformer
            twin.pipeline = weakly(memo[id(model)])
        return twin

    def __reduce__(self) -> Any:
        raise OpenVSAError(
            "an attached model cannot be pickled: detach its handle first, or use save_pretrained, which saves the "
            "model as if nothing were attached"
        )

    def mine(self) -> Forward | None:
        """The current forward, which is that of this thread.

        Raises:
            OpenVSAError: another thread has begun one since.
        """
        if self.forward is not None and not torch.compiler.is_compiling():
            self.forward.check_thread()
        return self.forward

    def watches(self) -> bool:
        """Whether calls are measured or shown to anyone. Never inside torch.compile or the capture of a CUDA graph, nor
        where tensors have no values."""
        if torch.compiler.is_compiling() or not (self.measure or self.callbacks):
            return False
        if self.forward is not None and self.forward.device.type == "meta":
            return False
        return not (captures_graph() or fakes_are_on())

    def layout(self, sequence: Sequence, suffix: int, device: torch.device) -> TileLayout:
        """The layout of a sequence with so many of its suffix tokens."""
        tile, q_tiles = (self.tile, ()) if self.config is None else (self.config.tile, self.config.q_tiles)
        return kept_layout(sequence.grid, tile, q_tiles, sequence.prefix, suffix, device)

    def attend(
        self,
        processor: SparseProcessor,
        attn: nn.Module,
        hidden_states: Tensor | None,
        index: int,
        of_text: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention [B, H, S, D] number `index` of a processor, sparse or watched. `of_text`: its
        mask is made of one of padded text."""
        forward = self.forward
        assert forward is not None

        def dense() -> Tensor:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip

        parts = self._parts_of_call(processor, forward, index, query)
        budget = processor.budget
        if budget is not None:
            reason = self._why_not(forward, query, attn_mask, of_text, dropout_p, is_causal)
            if reason and forward.hoisted:
                # Dense attention would not do either: what the reason speaks of is about raster order.
                raise_unsupported(f"{processor.name}: {reason}")  # pyright: ignore[reportCallIssue]
            if reason:
                processor.refuse(f"{processor.name}: {reason}")
                budget = None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # meta tensors know no autocast
            # As scaled_dot_product_attention does, which norms in fp32 rely on.
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) for x in (q, k, v))
        weight = None
        if budget is not None and self.branch is not None:
            assert hidden_states is not None
            weight = self.branch.weight(attn, hidden_states)
        watching = self.watches()
        if budget is None:
            if not watching:
                return dense()
            clock = Clock(query)
            out = dense()
            clock.stop()
            tally = self._tally(processor, parts[0].layout)
            tally.count_dense(processor.why_dense)
            tally.time(clock)
            # Under any other mask than that of padded text the tokens of an event would not tell what was attended.
            if self.callbacks and not self._why_not(forward, query, attn_mask, of_text, dropout_p, is_causal):
                seconds = clock.seconds() / len(parts)
                for one in parts:
                    mine = [one.samples(x) for x in (q, k, v)]
                    if not forward.hoisted:
                        mine = [one.layout.permute(x) for x in mine]
                    self._tell(processor, one.layout, None, *mine, seconds=seconds)
            return out

        outs: list[Tensor] = []
        plans: list[tuple[float, BlockPlan]] = []
        for number, one in enumerate(parts):
            # With the batch: FasterCache runs a part of it in some steps, inside of the model's own forward. Compiled
            # blocks would have graphs of their own for every batch.
            batch = 0 if hidden_states is None or torch.compiler.is_compiling() else len(hidden_states)
            place = (index if forward.sequence.per_sample else number, batch)
            mine_q, mine_k, mine_v = (one.samples(x) for x in (q, k, v))
            mine_weight = None if weight is None else one.samples(weight)
            clock = Clock(query) if watching else None
            out, plan, blocks = self._sparse(
                processor, one.layout, budget, place, mine_q, mine_k, mine_v, mine_weight, scale
            )
            if clock is not None:
                clock.stop()
                plans.append((1.0 if one.rows is None else len(one.rows) / len(query), plan))
                self._tally(processor, one.layout).time(clock)
                if self.callbacks:
                    self._tell(processor, one.layout, plan, *blocks, seconds=clock.seconds())
            if out.shape[1] < q.shape[1]:  # rows of padded text: nobody reads them
                out = functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1]))
            outs.append(out)
        if watching:
            self._tally(processor, parts[-1].layout).count(plans, budget)
        if len(outs) == 1:
            return outs[0].transpose(1, 2)
        rows = torch.cat([one.rows for one in parts if one.rows is not None])
        return torch.cat(outs).index_select(0, rows.argsort().to(q.device)).transpose(1, 2)

    def _sparse(
        self,
        processor: SparseProcessor,
        layout: TileLayout,
        budget: Budget | tuple[Budget, ...],
        place: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, BlockPlan, tuple[Tensor, Tensor, Tensor]]:
        """out [B, S, H, D] in the order of the call; the plan; and q, k, v in block order."""
        forward = self.forward
        assert forward is not None
        config = forward.config
        assert config is not None
        kept = processor.kept
        plan = None if kept is None else kept.plans.get(place)
        choose, pooled = plan is None and weight is None, None
        ours = type(config.selector) is PooledTopK and not isinstance(budget, tuple)
        if not forward.hoisted:
            # Means for the choice of tiles come with the permutation.
            (q, k, v), pooled = permute_pool_all(q, k, v, layout, pool=choose and ours)
            weight = None if weight is None else layout.permute(weight)
        if weight is not None:
            assert self.branch is not None
            out, plan = self.branch.attend(
                q, k, v, weight, layout, budget, config.selector, scale=scale, backend=config.backend
            )
        else:
            if plan is None:
                if pooled is not None and isinstance(config.selector, PooledTopK) and isinstance(budget, Budget):
                    plan = config.selector.plan(
                        pooled[0][:, layout.q_tile_blocks], pooled[1][:, layout.tile_blocks], layout, budget
                    )
                else:
                    plan = select_by_head(config.selector, q, k, layout, budget)
                if kept is not None:
                    kept.plans[place] = plan
                    kept.compiled = torch.compiler.is_compiling()
            out = block_sparse_attention(q, k, v, plan, scale=scale, backend=config.backend)
        if not forward.hoisted:
            out = layout.unpermute(out)
        return out, plan, (q, k, v)

    def _parts_of_call(
        self, processor: SparseProcessor, forward: Forward, index: int, query: Tensor
    ) -> tuple[Part, ...]:
        sequence, tokens = forward.sequence, query.shape[2]
        if sequence.per_sample:
            if index >= len(forward.parts) or query.shape[0] != 1:
                raise ShapeError(
                    f"{processor.name} should call attention once for each of {len(forward.parts)} samples, got call "
                    f"{index + 1} with a batch of {query.shape[0]}"
                )
            part = forward.parts[index]
            if tokens != part.layout.num_tokens:  # asked here, or every layer's name would be a guard of its graph
                # FasterCache runs half of the batch in some steps, inside of the model's own forward. Which sample this
                # is does not matter: as many tokens have the same layout.
                part = next((one for one in forward.parts if one.layout.num_tokens == tokens), part)
                part.layout.check(f"the self-attention of {processor.name}", tokens)
            return (part,)
        expected = sequence.prefix + math.prod(sequence.grid) + sequence.suffix
        if tokens != expected:
            raise ShapeError(
                f"the self-attention of {processor.name} has {tokens} tokens, but this forward has {expected}: "
                f"{sequence.prefix} prefix, a lattice of {sequence.grid}, {sequence.suffix} suffix"
            )
        if sequence.text_lengths is not None and len(sequence.text_lengths) != query.shape[0]:
            raise ShapeError(
                f"{processor.name} has a batch of {query.shape[0]}, but text lengths of {len(sequence.text_lengths)} "
                "samples were given"
            )
        return forward.parts

    def _why_not(
        self,
        forward: Forward,
        query: Tensor,
        attn_mask: Tensor | None,
        of_text: bool,
        dropout_p: float,
        is_causal: bool,
    ) -> str | None:
        if is_causal or dropout_p:
            return f"causal attention and dropout cannot be sparse here (is_causal={is_causal}, dropout_p={dropout_p})"
        if attn_mask is None:
            return None
        tokens = query.shape[2]
        if (
            forward.valid is None
            or attn_mask.dtype != torch.bool
            or attn_mask.dim() != 4
            or attn_mask.shape[-1] != tokens
        ):
            return (
                f"it got an attention mask ({attn_mask.dtype}, {tuple(attn_mask.shape)}); only boolean masks of padded "
                "text can be honoured by sparse attention"
            )
        if of_text or (attn_mask.shape[1] == attn_mask.shape[2] == 1 and forward.is_of_text(attn_mask)):
            return None
        return f"its attention mask is not that of padded text with {forward.sequence.text_lengths} valid tokens"

    def count_unseen(self, processor: SparseProcessor) -> None:
        """Take note of a dense call that did not go through scaled_dot_product_attention."""
        if self.watches() and self.forward is not None:
            self._tally(processor, self.forward.parts[0].layout).count_dense(processor.why_dense)

    def _tally(self, processor: SparseProcessor, layout: TileLayout) -> Tally:
        tally = self.tallies.setdefault(processor.layer, Tally(processor.layer, processor.name, layout))
        tally.layout = layout
        return tally

    def _tell(
        self,
        processor: SparseProcessor,
        layout: TileLayout,
        plan: BlockPlan | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seconds: float,
    ) -> None:
        forward = self.forward
        assert forward is not None
        when = float(forward.timestep.max()) if forward.timestep is not None else float("nan")
        event = AttentionEvent(
            processor.layer, processor.name, forward.step, when, layout, plan, q.detach(), k.detach(), v.detach(),
            seconds,
        )  # fmt: skip
        self.telling = True
        try:
            for callback in self.callbacks:
                callback(event)
        finally:
            self.telling = False

    def check_not_telling(self, what: str) -> None:
        """Refuse to `what` while callbacks are called.

        Raises:
            OpenVSAError: they are.
        """
        if self.telling:
            raise OpenVSAError(
                f"an on_attention callback cannot {what}: the forward that it is called from is not over, and its "
                "tokens may be in tile order; do so after the forward"
            )
