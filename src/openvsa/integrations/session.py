"""What one handle holds of a model: its settings, what the current forward is about, and what has been done."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvsa.config import Budget
from openvsa.errors import OpenVSAError, ShapeError, UnsupportedError
from openvsa.integrations.break_even import objection, share_of
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.families import Family, Hoist, Sequence
from openvsa.integrations.families.base import forward_names
from openvsa.integrations.forward import Forward, Part
from openvsa.integrations.intercept import SparseProcessor
from openvsa.integrations.report import AttentionCallback, AttentionEvent
from openvsa.integrations.reuse import Kept, KeptPlans
from openvsa.integrations.steps import StepClock, count_steps, running_pipeline, timesteps_of, warn_if_all_dense, weakly
from openvsa.integrations.tally import Clock, Tally
from openvsa.layout import TileLayout
from openvsa.layout.keep import fakes_are_on
from openvsa.layout.shelf import kept_layout
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, Selector, permute_pool_all, select_by_head
from openvsa.torch_op import check_visible

__all__ = ["Branch", "Session", "Site"]


class Branch(Protocol):
    """A compressed branch beside the sparse one, for models that were trained with it."""

    def weight(self, attn: nn.Module, hidden_states: Tensor) -> Tensor | None:
        """The branch weight [B, S, H, D], in the token order of hidden_states [B, S, C]; None where there is none."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        layout: TileLayout,
        budget: Budget | tuple[Budget, ...],
        selector: Selector,
        *,
        scale: float | None,
        backend: str,
    ) -> tuple[Tensor, BlockPlan]:
        """Both branches together: [B, S, H, D] and the plan of the sparse one. All tensors are in block order."""
        ...


_COMPILED_STEPS = (
    "settings that depend on the denoising step need the timestep's value, which a compiled forward does not have; "
    "compile the blocks instead: transformer.compile_repeated_blocks()"
)


# Outside of what is compiled: not every Dynamo can trace the making of an error.
@torch.compiler.disable(reason=_COMPILED_STEPS)
def _refuse_compiled_steps() -> NoReturn:
    raise UnsupportedError(_COMPILED_STEPS, {})


def _captures_graph() -> bool:
    """Whether this forward becomes a CUDA graph, whose replays run none of this code."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass
class Session:
    """Settings None: the model is only watched, and stays dense."""

    config: SparsityConfig | None
    tile: tuple[int, ...] | None
    measure: bool
    branch: Branch | None = None
    pipeline: Callable[[], Any] = lambda: None
    callbacks: list[AttentionCallback] = field(default_factory=list)
    tallies: dict[int, Tally] = field(default_factory=dict)
    forward: Forward | None = None
    clock: StepClock = field(default_factory=StepClock)
    plans: KeptPlans = field(default_factory=KeptPlans)

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
        return not (_captures_graph() or fakes_are_on())

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
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention [B, H, S, D] number `index` of a processor, sparse or watched."""
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
            reason = self._why_not(forward, query, attn_mask, dropout_p, is_causal)
            if reason and forward.hoisted:
                # Dense attention would not do either: what the reason speaks of is about raster order.
                raise UnsupportedError(f"{processor.name}: {reason}", {})
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
            if self.callbacks and not self._why_not(forward, query, attn_mask, dropout_p, is_causal):
                seconds = clock.seconds() / len(parts)
                for one in parts:
                    mine = [one.samples(x) for x in (q, k, v)]
                    if not forward.hoisted:
                        mine = [one.layout.permute(x) for x in mine]
                    self._tell(processor, one.layout, None, *mine, seconds=seconds)
            return out

        outs = []
        for number, one in enumerate(parts):
            place = index if forward.sequence.per_sample else number
            mine_q, mine_k, mine_v = (one.samples(x) for x in (q, k, v))
            mine_weight = None if weight is None else one.samples(weight)
            clock = Clock(query) if watching else None
            out, plan, blocks = self._sparse(
                processor, one.layout, budget, place, mine_q, mine_k, mine_v, mine_weight, scale
            )
            if clock is not None:
                clock.stop()
                tally = self._tally(processor, one.layout)
                tally.count(plan, budget)
                tally.time(clock)
                if self.callbacks:
                    self._tell(processor, one.layout, plan, *blocks, seconds=clock.seconds())
            if out.shape[1] < q.shape[1]:  # rows of padded text: nobody reads them
                out = functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1]))
            outs.append(out)
        if len(outs) == 1:
            return outs[0].transpose(1, 2)
        rows = torch.cat([one.rows for one in parts if one.rows is not None])
        return torch.cat(outs).index_select(0, rows.argsort().to(q.device)).transpose(1, 2)

    def _sparse(
        self,
        processor: SparseProcessor,
        layout: TileLayout,
        budget: Budget | tuple[Budget, ...],
        place: int,
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
                if not isinstance(budget, tuple):
                    if pooled is not None and isinstance(config.selector, PooledTopK):
                        plan = config.selector.plan(
                            pooled[0][:, layout.q_tile_blocks], pooled[1][:, layout.tile_blocks], layout, budget
                        )
                    else:
                        plan = config.selector(q, k, layout, budget)
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
        self, forward: Forward, query: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> str | None:
        if is_causal or dropout_p:
            return f"causal attention and dropout cannot be sparse here (is_causal={is_causal}, dropout_p={dropout_p})"
        if attn_mask is None:
            return None
        lengths, tokens = forward.sequence.text_lengths, query.shape[2]
        if lengths is None or attn_mask.dtype != torch.bool or attn_mask.dim() != 4 or attn_mask.shape[-1] != tokens:
            return (
                f"it got an attention mask ({attn_mask.dtype}, {tuple(attn_mask.shape)}); only boolean masks of padded "
                "text can be honoured by sparse attention"
            )
        if torch.compiler.is_compiling() or attn_mask.is_meta or forward.is_of_text(attn_mask[:, 0, 0]):
            return None  # one without values has been looked at before it was made one of pairs
        return f"its attention mask is not that of padded text with {lengths} valid tokens"

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
            processor.layer, processor.name, when, layout, plan, q.detach(), k.detach(), v.detach(), seconds
        )
        for callback in self.callbacks:
            callback(event)


# What Diffusers' hooks of these modules do to hidden states, they do to each token alone and in this forward alone.
_TOKENWISE_HOOKS = {f"diffusers.hooks.{name}" for name in ("group_offloading", "layerwise_casting", "layer_skip")}
# Where the hooks are from that guidance by a weaker model puts in place for one forward, with the prompt of another.
_WEAKER = "diffusers.hooks.layer_skip"


def _permute_argument(name: str, value: Any, axis: int, dims: int, layout: TileLayout) -> Any:
    if isinstance(value, (list, tuple)):  # torch.compile of torch 2.9 cannot check against a union
        return tuple(_permute_argument(name, one, axis, dims, layout) for one in value)
    if not isinstance(value, Tensor) or value.dim() != dims or value.shape[axis] == 1:  # one number for all tokens
        return value
    layout.check(f"the argument {name}", value.shape[axis])
    return layout.permute(value, axis)


@dataclass
class Site:
    """One transformer of a session: what its hooks do."""

    session: Session
    family: Family
    transformer: Any
    attentions: list[tuple[nn.Module, SparseProcessor]]
    hoist: Hoist | None
    dense_layers: frozenset[int] = frozenset()
    told: bool = False
    processors: list[SparseProcessor] = field(init=False)
    names: tuple[str, ...] = field(init=False)
    places: tuple[tuple[str, nn.Module], ...] = field(init=False)  # names in the transformer, and what has the hooks
    modules: tuple[nn.Module, ...] = field(init=False)  # all of the transformer

    def __post_init__(self) -> None:
        self.processors = [processor for _, processor in self.attentions]
        # The class's own forward: offloading hooks put another on the instance.
        self.names = forward_names(type(self.transformer))
        hooked = () if self.hoist is None else (self.hoist.exit[0], *(module for module, _, _ in self.hoist.entries))
        self.places = tuple(
            (name, module) for name, module in self.transformer.named_modules() if any(module is one for one in hooked)
        )
        self.modules = tuple(self.transformer.modules())

    def begin_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook of the transformer."""
        session = self.session
        if session.config is not None:
            check_visible("sparse attention")
        arguments = {**dict(zip(self.names[: len(args)], args[: len(self.names)], strict=True)), **kwargs}
        sequence = self.family.sequence(module, (), arguments)
        timestep = self.family.timestep((), arguments)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        parts = self._parts(sequence, device)
        session.forward = forward = Forward(sequence, parts, timestep, device, session.config, thread)
        condition, variant = self.family.condition((), arguments), self.family.variant((), arguments)
        dense = self._decide(sequence, timestep, condition, variant, device)
        for attn, processor in () if dense else self.attentions:
            processor.check_place(attn)
        if dense or self.hoist is None or self._has_cache():
            return None
        if self.family.needs_raster_order((), arguments):
            return None
        if any(module.get_submodule(name) is not place for name, place in self.places):
            # A LoRA has wrapped it since, and adds to what its hook returns.
            return None
        forward.entered = self._around(sequence, self.hoist.entry_around, device)
        forward.left = self._around(sequence, self.hoist.around, device)
        for name, axis, dims in self.hoist.arguments:
            if name in arguments:
                arguments[name] = _permute_argument(name, arguments[name], axis, dims, forward.left)
        return (), arguments

    def _has_cache(self) -> bool:
        """Whether something may hold hidden states of other steps, whose order may be another: a cache of Diffusers,
        however it was put in place (`enable_cache`, or `apply_first_block_cache` and its like), or an unknown hook."""
        if getattr(self.transformer, "is_cache_enabled", False):
            return True
        if torch.compiler.is_compiling():  # it has no steps
            return False
        return any(where not in _TOKENWISE_HOOKS for _, where in self._hooks())

    def _hooks(self) -> Iterator[tuple[int, str]]:
        """Hooks of Diffusers that are in place now: the number of the module, and where the hook's class is from."""
        for number, module in enumerate(self.modules):
            registry = module.__dict__.get("_diffusers_hook")
            for hook in () if registry is None else registry.hooks.values():
                yield number, type(hook).__module__

    def end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of the transformer."""
        forward, found = self.session.mine(), []
        for processor in self.processors:
            if processor.kept is not None and processor.kept.compiled:
                processor.kept.settle()
            found.append((processor.budget, processor.why_dense, processor.kept))
            processor.kept = None  # the session keeps them, for as long as the prompt lives
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return

        again = getattr(self.transformer, "is_gradient_checkpointing", False)

        # Blocks that the backward pass computes again (checkpointing) are about this forward, whatever has run since.
        def recall(grad: Tensor) -> None:
            if again and not self.processors[0].attached:
                raise OpenVSAError(
                    "the handle was detached between a forward and its backward pass, which with gradient "
                    "checkpointing computes the layers again; detach after the backward pass"
                )
            self.session.forward = forward
            if forward is not None:
                forward.thread = 0  # autograd has threads of its own
            for processor, (budget, why_dense, kept) in zip(self.processors, found, strict=True):
                processor.budget, processor.why_dense, processor.kept = budget, why_dense, kept

        values = (output,) if isinstance(output, Tensor) else output  # Kandinsky 5's may be the tensor itself
        for value in values.values() if isinstance(values, dict) else values:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(recall)

    def enter(self, module: nn.Module, args: Any, output: Any, first: int, last: int) -> Any:
        """The forward hook of an entry: lattice axes first to last of its output to block order."""
        forward = self.session.mine()
        if forward is None or forward.entered is None:
            return None
        layout = forward.entered

        def permute(x: Tensor) -> Tensor:
            flat, axis = x.flatten(first, last), first
            if first == 0 < last:
                flat, axis = flat.unflatten(0, (-1, layout.num_tokens)), 1
            # Contiguous, so that the first layer gets the strides of all others and compiles into their graph.
            return layout.permute(flat.movedim(axis, 1)).movedim(1, axis).reshape(x.shape).contiguous()

        return tuple(permute(x) for x in output) if isinstance(output, tuple) else permute(output)

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """The forward hook of the exit: back to raster order."""
        forward = self.session.mine()
        if forward is None or forward.left is None or self.hoist is None:
            return None
        return forward.left.unpermute(output, dim=self.hoist.exit[1])

    def _around(self, sequence: Sequence, around: tuple[bool, bool], device: torch.device) -> TileLayout:
        """The layout of the lattice with the tokens before it, and those after it, if these are among them."""
        before, after = around
        whole = Sequence(sequence.grid, sequence.prefix if before else 0)
        return self.session.layout(whole, sequence.suffix if after else 0, device)

    def _parts(self, sequence: Sequence, device: torch.device) -> tuple[Part, ...]:
        session, lengths = self.session, sequence.text_lengths
        if lengths is None:
            return (Part(session.layout(sequence, sequence.suffix, device)),)
        if sequence.per_sample:
            return tuple(Part(session.layout(sequence, length, device)) for length in lengths)
        distinct = sorted(set(lengths))
        if len(distinct) == 1:
            return (Part(session.layout(sequence, distinct[0], device)),)
        return tuple(
            Part(
                session.layout(sequence, length, device),
                torch.tensor([row for row, mine in enumerate(lengths) if mine == length], device=device),
            )
            for length in distinct
        )

    def _decide(
        self,
        sequence: Sequence,
        timestep: Tensor | None,
        condition: Tensor | None,
        variant: tuple[Any, ...],
        device: torch.device,
    ) -> bool:
        """Give every layer its budget and its kept plans for this forward. True if all layers stay dense."""
        session, config = self.session, self.session.config
        step, num_steps, kept = 0, None, None
        if config is None:
            return True
        if config.needs_steps:
            step, num_steps = self._step(config, sequence, timestep)
            if config.reuse_steps > 1:
                variant = (*variant, *(found for found in self._hooks() if found[1] == _WEAKER))
                about = (sequence, None if condition is None else condition.shape[0], id(self.transformer))
                kept = session.plans.of(condition, variant, about, step, config.reuse_steps)
        forward = session.forward
        assert forward is not None
        layout = forward.parts[0].layout
        for processor in self.processors:
            found = "it is one of dense_layers"
            if processor.layer not in self.dense_layers:
                found = config.at(processor.name, step, num_steps, layout.num_tokens)
                if not isinstance(found, str) and config.min_tokens is None:
                    found = self._too_slow(found, layout, device) or found
            processor.budget, processor.why_dense = (None, found) if isinstance(found, str) else (found, "")
            processor.kept = None if kept is None else kept.setdefault(processor.layer, Kept())
        return all(processor.budget is None for processor in self.processors)

    def _too_slow(self, budget: Budget | tuple[Budget, ...], layout: TileLayout, device: torch.device) -> str:
        """Why sparse attention is not worth it, if it is not. Weights that were trained with it want it at any price,
        and so does training."""
        if self.session.branch is not None or (self.transformer.training and torch.is_grad_enabled()):
            return ""
        # torch.compile may take any number for a symbol.
        tokens, tiles = operator.index(layout.num_tokens), operator.index(layout.num_tiles)
        heads, head_dim = (operator.index(number) for number in self.family.heads(self.transformer))
        share = share_of(budget, tiles)
        if share == 1.0:  # never worth it: whoever asks for it wants to see that it is the same
            return ""
        why = objection(str(device), tokens, heads, head_dim, share.__float__())
        if why and not self.told and not torch.compiler.is_compiling():
            self.told = True
            warnings.warn(f"attention stays dense: {why}; SparsityConfig(min_tokens=0) makes it sparse", stacklevel=2)
        return why

    def _step(self, config: SparsityConfig, sequence: Sequence, timestep: Tensor | None) -> tuple[int, int | None]:
        """The step of this forward, and of how many, if the settings ask."""
        if torch.compiler.is_compiling():
            _refuse_compiled_steps()  # pyright: ignore[reportCallIssue]
        if _captures_graph():
            raise UnsupportedError(
                "settings that depend on the denoising step are decided on the host in every forward, and the replays "
                "of a CUDA graph would stay with those of the step it was captured in, and with its plans. Leave out "
                "steps, dense_first_steps, dense_last_steps and reuse_steps, or capture no graph",
                {},
            )
        if timestep is None:
            raise UnsupportedError(f"{self.family.name} has no timestep, so its settings cannot depend on the step", {})
        if self.transformer.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "settings that depend on the denoising step are for generation; training draws timesteps at random. "
                "Call transformer.eval(), or leave out steps, dense_first_steps, dense_last_steps and reuse_steps",
                {},
            )
        session = self.session
        # In a loop of the user's own the pipeline that was given has the scheduler.
        pipeline = running_pipeline(self.transformer) or session.pipeline()
        timesteps = timesteps_of(pipeline)
        if session.clock.tick(float(timestep.max()), sequence.grid, timesteps):
            session.plans.clear()
            if timesteps is not None:
                warn_if_all_dense(config, pipeline)
        step = session.clock.step
        return step, count_steps(pipeline, step) if config.dense_last_steps else None
