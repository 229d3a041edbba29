"""A processor that runs the model's own processor and takes over the one attention call in it.

Diffusers' processors, old and new, end in `torch.nn.functional.scaled_dot_product_attention`, the new ones through
the native backends of its dispatcher. A `TorchFunctionMode` is PyTorch's public way to see that call, so projections,
norms and rotary embeddings stay the model's own, and nobody's namespace is changed. torch.compile traces such modes.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from openvsa.config import Budget
from openvsa.errors import OpenVSAError, UnsupportedError

if TYPE_CHECKING:
    from openvsa.integrations.families import Family
    from openvsa.integrations.reuse import Kept
    from openvsa.integrations.session import Session

__all__ = ["SparseProcessor", "raise_unsupported", "wrap"]

# scaled_dot_product_attention, seen and answered: with BHSD tensors and its own arguments.
Attend = Callable[..., Tensor]


# Outside of what is compiled: not every Dynamo can trace the making of an error.
@torch.compiler.disable(
    reason="sparse attention refuses a call; compile without fullgraph=True, and the error says why"
)
def raise_unsupported(reason: str) -> NoReturn:
    raise UnsupportedError(reason)


class Interception(TorchFunctionMode):
    """Inside, scaled_dot_product_attention calls of a self-attention are answered by `attend`.

    A call whose keys are not as many as its queries is some cross-attention in the same processor, and passes.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            # Of equal lengths: Dynamo in torch 2.9 compares them whatever `strict` says.
            kwargs = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
            if kwargs["query"].shape[-2] != kwargs["key"].shape[-2]:
                return func(**kwargs)
            self.calls += 1
            return self.attend(self.calls - 1, **kwargs)
        if func is Tensor.unflatten:
            # A method written in Python that calls super(), which Dynamo traces only when called as a method.
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


class SparseProcessor:
    """Stands in a layer's attention module for the processor `inner`. Made by `wrap`.

    `budget` (None: dense, for the reason in `why_dense`), `kept` and the session's current forward are set at the
    beginning of every forward, outside of what may be compiled block by block.
    """

    def __init__(self, inner: Any, layer: int, name: str, family: Family, session: Session) -> None:
        self.inner, self.layer, self.name, self.family, self.session = inner, layer, name, family, session
        self.attached = True
        self.budget: Budget | tuple[Budget, ...] | None = None
        self.why_dense = ""
        self.kept: Kept | None = None
        self.warned = False

    # Diffusers sets these on a model's processors, and looks first whether they have them.
    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.inner._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.inner._parallel_config = value

    def run(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The call of the processor."""
        session = self.session
        if not self.attached:
            return self.inner(attn, *args, **kwargs)
        forward = session.mine()
        if forward is None or (forward.over and not torch.compiler.is_compiling()):
            raise OpenVSAError(f"{self.name} ran outside its transformer's forward, so its lattice is not known")
        if _attends_to_nothing(attn):
            return self.inner(attn, *args, **kwargs)
        dense = self.budget is None
        if dense and not session.watches():
            return self.inner(attn, *args, **kwargs)
        if not dense and getattr(self.inner, "_parallel_config", None) is not None:
            raise UnsupportedError(f"{self.name} runs under context parallelism, which is not supported yet")
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        # What is made of such a mask is one of padded text, too.
        text_mask: Tensor | None = kwargs.get(self.family.pair_mask)
        of_text = text_mask is not None and forward.is_of_text(text_mask)

        def attend(index: int, **call: Any) -> Tensor:
            return session.attend(self, attn, hidden_states, index, of_text, **call)

        mode = Interception(attend)
        # Compiled processors make nothing that is not read.
        if text_mask is not None and of_text and not dense and not torch.compiler.is_compiling():
            out = self._without_pairs(mode, attn, args, {**kwargs, self.family.pair_mask: text_mask.to("meta")})
            if mode.calls:
                return out
        with mode:
            out = self.inner(attn, *args, **kwargs)
        if not mode.calls:
            self._without_call(dense, attn, args, kwargs)
        return out

    def _without_pairs(self, mode: Interception, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the call, made with a mask of text that has no values: a processor that makes one of all pairs
        of tokens of it does so for nothing, since sparse attention knows the lengths, and in each layer: 12 GiB for
        113,000 tokens. If the mode saw no attention the output is none: an attention backend wants the values."""
        try:
            with mode:
                return self.inner(attn, *args, **kwargs)
        except RuntimeError as error:
            # What torch says of tensors without values. The call is made again with them, and says what else is wrong.
            if mode.calls or "meta" not in str(error):
                raise
            return None

    def check_place(self, attn: Any) -> None:
        """Refuse a forward in which Diffusers has put a processor of its own in this one's place. Others' may be around
        this one."""
        now = attn.processor
        if now is not self and type(now).__module__.startswith("diffusers."):
            self.refuse(
                f"the processor of {self.name} was replaced by {type(now).__name__} after it was made sparse (by "
                "set_attn_processor, or fuse_qkv_projections of CogVideoX); detach the handle first, and sparsify "
                "again afterwards"
            )

    def _without_call(self, dense: bool, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if dense:
            self.session.count_unseen(self)
            return
        names = call_names(type(self.inner))
        arguments = {**dict(zip(names[: 1 + len(args)], (attn, *args)[: len(names)], strict=True)), **kwargs}
        if self.family.without_attention(arguments):
            return
        backend = getattr(self.inner, "_attention_backend", None)
        said = f"the attention backend {getattr(backend, 'value', backend)!r}" if backend else "its attention backend"
        self.refuse(
            f"{self.name} ({type(self.inner).__name__}) made no self-attention call that can be made sparse: {said} "
            "does not go through PyTorch's scaled_dot_product_attention. Set a native one: "
            "transformer.set_attention_backend('native')"
        )
        self.session.count_unseen(self)

    def refuse(self, reason: str) -> None:
        """Raise, or if the settings are not strict warn once: this call stays dense."""
        config = self.session.config
        if config is None or config.strict:
            raise_unsupported(reason)  # pyright: ignore[reportCallIssue]
        self.why_dense = reason
        if not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(f"dense attention instead of sparse: {reason}", stacklevel=2)


def _attends_to_nothing(attn: Any) -> bool:
    """Whether a hook of Diffusers' PerturbedAttentionGuidance answers attention of this module by its values. It does
    so in a mode around this processor, which would not see calls that are answered here."""
    registry = getattr(attn, "_diffusers_hook", None)
    return registry is not None and any(
        getattr(hook, "skip_attention_scores", False) for hook in registry.hooks.values()
    )


def wrap(inner: Any, layer: int, name: str, family: Family, session: Session) -> SparseProcessor:
    """A SparseProcessor around `inner` that shows the call signature of `inner`.

    Attention modules look at that signature and drop the arguments that it does not name.
    """
    while isinstance(inner, SparseProcessor) and not inner.attached:  # kept by someone and put back after `detach`
        inner = inner.inner
    if isinstance(inner, SparseProcessor):
        raise OpenVSAError(f"{name} is attached already: detach its handle first, or set that handle's density")
    if isinstance(inner, nn.Module):
        raise UnsupportedError(
            f"{name} has the processor {type(inner).__name__} with weights of its own (an IP-Adapter, say), which "
            "would leave the model's modules; unload it first"
        )
    return _wrapper(type(inner))(inner, layer, name, family, session)


@functools.cache
def _wrapper(kind: type) -> type[SparseProcessor]:
    def __call__(self: SparseProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, *args, **kwargs)

    functools.update_wrapper(__call__, kind.__call__)
    # Diffusers tells some processors by words in their names.
    return type(f"Sparse{kind.__name__}", (SparseProcessor,), {"__call__": __call__, "__module__": __name__})


@functools.cache
def call_names(kind: type) -> tuple[str, ...]:
    """Names of the parameters of a processor's call after self."""
    return tuple(inspect.signature(kind.__call__).parameters)[1:]
