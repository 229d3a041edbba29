"""What the integration asks of a model family: where its video self-attention is, and what one forward is about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from openvsa.errors import ShapeError

__all__ = ["Family", "Hoist", "Sequence", "block_attentions", "has_mask", "latent_grid"]


@dataclass(frozen=True)
class Sequence:
    """The tokens that the video self-attention of one forward runs over: prefix, lattice in raster order, suffix.

    Args:
        grid: tokens of the lattice along (T, H, W), or (H, W) for an image.
        prefix, suffix: text or conditioning tokens before and after the lattice. They read and are read by everything.
        text_lengths: where the suffix is text padded to one length, the valid tokens of each sample, which come
            first; the rest is not attended, and its own rows are 0. None means that all tokens are valid.
        per_sample: the processor calls attention once for each sample, in order, with that sample's valid text alone.

    Raises:
        ShapeError: a number is out of range.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    text_lengths: tuple[int, ...] | None = None
    per_sample: bool = False

    def __post_init__(self) -> None:
        if not self.grid or min(self.grid) < 1 or self.prefix < 0 or self.suffix < 0:
            raise ShapeError(
                f"a sequence needs a grid of positive numbers and prefix, suffix >= 0, got grid={self.grid}, "
                f"prefix={self.prefix}, suffix={self.suffix}"
            )
        if self.text_lengths is not None and not all(0 <= n <= self.suffix for n in self.text_lengths):
            raise ShapeError(f"text_lengths must be within the {self.suffix} suffix tokens, got {self.text_lengths}")
        if self.per_sample and self.text_lengths is None:
            raise ShapeError("a sequence with one call per sample needs text_lengths, got None")


@dataclass(frozen=True)
class Hoist:
    """Where tokens enter and leave a transformer, so that they can be put in block order once for all layers.

    Args:
        entries: (module, first axis, last axis): the lattice is at these axes of the module's output (of each tensor
            of it, if it is a tuple); one axis if the lattice is flat already. Axis 0 to a later one: the samples of
            the batch are joined to the lattice's first axis.
        exit: (module, axis): the module behind the last layer, whose output goes back to raster order.
        arguments: (name, axis, number of dimensions): forward arguments with a number or more for each token, tensors
            or lists and tuples of them. Those of another number of dimensions are left alone.
        entry_around: whether the outputs of the entries hold the tokens before the lattice, and those after it, too.
        around: the same of the arguments and of the output of the exit.
    """

    entries: tuple[tuple[nn.Module, int, int], ...]
    exit: tuple[nn.Module, int]
    arguments: tuple[tuple[str, int, int], ...] = ()
    entry_around: tuple[bool, bool] = (False, False)
    around: tuple[bool, bool] = (False, False)


class Family(ABC):
    """One family of transformers. Stateless; `kwargs` are the arguments of a forward, all by name."""

    name: str
    pair_mask: str = ""
    """The argument of the processors that masks text, [B, text], if they make a mask of all pairs of tokens of it."""

    @abstractmethod
    def attentions(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """(qualified name, module) of every video self-attention, in order of execution. A module has `processor`."""

    @abstractmethod
    def sequence(self, transformer: Any, kwargs: Mapping[str, Any]) -> Sequence:
        """What the self-attention of this forward runs over, from its arguments alone.

        Raises:
            UnsupportedError: this use of the model cannot be sparse.
        """

    def timestep(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The noise level: any numbers that fall from step to step and rise when a new generation begins."""
        return kwargs.get("timestep")

    def heads(self, transformer: Any) -> tuple[int, int]:
        """Heads of the video self-attention, and channels of each."""
        return transformer.config.num_attention_heads, transformer.config.attention_head_dim

    def condition(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The tensor whose identity tells the branches of guidance apart when they run one after the other."""
        return kwargs.get("encoder_hidden_states")

    def variant(self, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """What tells branches of guidance apart whose `condition` is one tensor."""
        return ()

    def hoist(self, transformer: Any) -> Hoist | None:
        """Where to permute once for all layers, or None where something between the layers needs raster order."""
        return None

    def needs_raster_order(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether arguments of this forward bring something in raster order into the layers, which `hoist` cannot put
        in another. Then each layer permutes for itself."""
        return False

    def without_attention(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a processor that has made no attention call was right not to; kwargs are the processor's own."""
        return False


def block_attentions(transformer: nn.Module, lists: tuple[str, ...], attention: str) -> list[tuple[str, nn.Module]]:
    """The module `attention` of every block of the named lists, in order, with its qualified name."""
    return [
        (f"{name}.{index}.{attention}", getattr(block, attention))
        for name in lists
        for index, block in enumerate(getattr(transformer, name))
    ]


def has_mask(options: Any) -> bool:
    """Whether the keyword arguments that a forward hands on to its processors have an attention mask among them."""
    return bool(options) and options.get("attention_mask") is not None


def latent_grid(latents: Tensor, axes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens along the given axes of latents in patches; a rest smaller than a patch is dropped, as in Diffusers.

    Raises:
        ShapeError: the latents are not 5-D.
    """
    if latents.ndim != 5:
        raise ShapeError(
            f"expected latents of 5 dimensions, such as [batch, channels, frames, height, width], got "
            f"{list(latents.shape)}; pass them to the transformer as its pipeline does"
        )
    return tuple(latents.shape[axis] // side for axis, side in zip(axes, patch, strict=True))
