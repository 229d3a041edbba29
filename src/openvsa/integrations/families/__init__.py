"""The model families, looked up by the class of the transformer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from openvsa.errors import UnsupportedError
from openvsa.integrations.families.base import Family, Hoist, Sequence

__all__ = ["Family", "Hoist", "Sequence", "family_of", "supported"]

# Diffusers class -> (module here, its Family). One line each.
_FAMILIES = {
    "CogVideoXTransformer3DModel": ("cogvideox", "CogVideoX"),
    "Flux2Transformer2DModel": ("flux", "Flux2"),
    "FluxTransformer2DModel": ("flux", "Flux"),
    "HunyuanVideo15Transformer3DModel": ("hunyuan_video15", "HunyuanVideo15"),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video", "HunyuanVideo"),
    "MochiTransformer3DModel": ("mochi", "Mochi"),
    "WanTransformer3DModel": ("wan", "Wan"),
    "WanVACETransformer3DModel": ("wan", "Wan"),
    "WanAnimateTransformer3DModel": ("wan", "Wan"),
    "LTXVideoTransformer3DModel": ("ltx", "LTX"),
    "LTX2VideoTransformer3DModel": ("ltx2", "LTX2"),
    "CosmosTransformer3DModel": ("cosmos", "Cosmos"),
    "Kandinsky5Transformer3DModel": ("kandinsky5", "Kandinsky5"),
}


def supported() -> tuple[str, ...]:
    """Names of the Diffusers transformer classes that can be sparse."""
    return tuple(_FAMILIES)


def family_of(transformer: Any) -> Family:
    """The family of a transformer, or of the nearest of its base classes.

    Raises:
        UnsupportedError: there is none.
    """
    for kind in type(transformer).__mro__:
        if kind.__name__ in _FAMILIES and kind.__module__.split(".")[0] == "diffusers":
            module, name = _FAMILIES[kind.__name__]
            return getattr(import_module(f"openvsa.integrations.families.{module}"), name)()
    raise UnsupportedError(
        f"{type(transformer).__name__} is of no supported family; supported: {', '.join(supported())}. Of what wraps a "
        "model, such as DistributedDataParallel or PeftModel, give the model inside"
    )
