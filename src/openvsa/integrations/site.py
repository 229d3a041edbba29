"""What the hooks of one transformer do: read what a forward is about, decide who is sparse in it, order its tokens."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from openvsa.config import Budget
from openvsa.errors import OpenVSAError, UnsupportedError
from openvsa.integrations.break_even import objection, share_of
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.families import Family, Hoist, Sequence
from openvsa.integrations.forward import Forward, Part
from openvsa.integrations.intercept import SparseProcessor
from openvsa.integrations.reuse import Kept
from openvsa.integrations.session import Session, captures_graph
from openvsa.integrations.steps import running_pipeline, timesteps_of, warn_if_all_dense
from openvsa.layout import TileLayout
from openvsa.torch_op import check_visible

__all__ = ["Site"]

_COMPILED_STEPS = (
    "settings that depend on the denoising step need the timestep's value, which a compiled forward does not have; "
    "compile the blocks instead: transformer.compile_repeated_blocks()"
)


# Outside of what is compiled: not every Dynamo can trace the making of an error.
@torch.compiler.disable(reason=_COMPILED_STEPS)
def _refuse_compiled_steps() -> NoReturn:
    raise UnsupportedError(_COMPILED_STEPS)


@torch.compiler.disable(reason="whether masks are those of padded text is told by their values")
def _check_masks(forward: Forward) -> None:
    forward.check_masks()


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
    names: tuple[str, ...] = field(init=False)  # of the arguments of the transformer's forward
    required: tuple[str, ...] = field(init=False)  # those of them that have no default
    places: tuple[tuple[str, nn.Module], ...] = field(init=False)  # names in the transformer, and what has the hooks
    modules: tuple[nn.Module, ...] = field(init=False)  # all of the transformer

    def __post_init__(self) -> None:
        self.processors = [processor for _, processor in self.attentions]
        # The class's own forward: offloading hooks put another on the instance.
        parameters = list(inspect.signature(type(self.transformer).forward).parameters.values())[1:]
        self.names = tuple(one.name for one in parameters)
        self.required = tuple(
            one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
        )
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
        session.check_not_telling("run the model that it watches")
        if session.config is not None:
            check_visible("sparse attention")
        arguments = {**dict(zip(self.names[: len(args)], args[: len(self.names)], strict=True)), **kwargs}
        if len(args) > len(self.names) or not all(name in arguments for name in self.required):
            return None  # the transformer says itself what is wrong with such a call
        sequence = self.family.sequence(module, arguments)
        timestep = self.family.timestep(arguments)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        parts = self._parts(sequence, device)
        session.forward = forward = Forward(sequence, parts, timestep, device, session.config, thread)
        condition, variant = self.family.condition(arguments), self.family.variant(arguments)
        dense = self._decide(sequence, timestep, condition, variant, device)
        for attn, processor in () if dense else self.attentions:
            processor.check_place(attn)
        if dense or self.hoist is None or self._has_cache():
            return None
        if self.family.needs_raster_order(arguments):
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
        if forward is not None and forward.unread:
            _check_masks(forward)
        for processor in self.processors:
            if processor.kept is not None and processor.kept.compiled:
                processor.kept.settle()
            found.append((processor.budget, processor.why_dense, processor.kept))
            processor.kept = None  # the session keeps them, for as long as the prompt lives
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            if forward is not None:
                forward.over = True
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
        session, config, forward = self.session, self.session.config, self.session.forward
        assert forward is not None
        step, num_steps, kept = 0, None, None
        if config is not None and config.needs_steps:
            step, num_steps = self._step(config, sequence, timestep)
            if config.reuse_steps > 1:
                variant = (*variant, *(found for found in self._hooks() if found[1] == _WEAKER))
                batch = None if condition is None else condition.shape[0]
                about = (sequence, batch, id(self.transformer), config.steps.get(step))
                kept = session.plans.of(condition, variant, about, step, config.reuse_steps)
        elif session.callbacks and session.watches() and timestep is not None:
            self._tick(sequence, timestep)
        forward.step = max(session.clock.step, 0)
        if config is None:
            return True
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
        # Text and references stay dense.
        lattice = (tokens - operator.index(layout.prefix) - operator.index(layout.suffix)) / tokens
        density = 1 - (1 - share.__float__()) * lattice**2
        why = objection(str(device), tokens, heads, head_dim, density)
        if why and not self.told and not torch.compiler.is_compiling():
            self.told = True
            warnings.warn(f"attention stays dense: {why}; SparsityConfig(min_tokens=0) makes it sparse", stacklevel=2)
        return why

    def _step(self, config: SparsityConfig, sequence: Sequence, timestep: Tensor | None) -> tuple[int, int | None]:
        """The step of this forward, and of how many, if the settings ask."""
        if torch.compiler.is_compiling():
            _refuse_compiled_steps()  # pyright: ignore[reportCallIssue]
        if captures_graph():
            raise UnsupportedError(
                "settings that depend on the denoising step are decided on the host in every forward, and the replays "
                "of a CUDA graph would stay with those of the step it was captured in, and with its plans. Leave out "
                "steps, dense_first_steps, dense_last_steps and reuse_steps, or capture no graph"
            )
        if timestep is None:
            raise UnsupportedError(f"{self.family.name} has no timestep, so its settings cannot depend on the step")
        if self.transformer.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "settings that depend on the denoising step are for generation; training draws timesteps at random. "
                "Call transformer.eval(), or leave out steps, dense_first_steps, dense_last_steps and reuse_steps"
            )
        begins, pipeline = self._tick(sequence, timestep)
        clock = self.session.clock
        if begins:
            self.session.plans.clear()
            if timesteps_of(pipeline) is not None:
                warn_if_all_dense(config, clock.count(pipeline))
        return clock.step, clock.count(pipeline) if config.dense_last_steps else None

    def _tick(self, sequence: Sequence, timestep: Tensor) -> tuple[bool, Any]:
        """Let the clock take note of this forward: whether it begins a generation, and the pipeline with the scheduler.
        Waits for the device."""
        running = running_pipeline(self.transformer)
        # In a loop of the user's own the pipeline that was given has the scheduler.
        pipeline = running or self.session.pipeline()
        level = float(timestep.max())
        return self.session.clock.tick(level, sequence.grid, pipeline, running=running is not None), pipeline
