"""What the families with text in the same attention share: blocks that hold one joint attention, and 5-D latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from openvsa.errors import ShapeError

__all__ = ["block_attentions", "has_mask", "latent_grid"]


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
