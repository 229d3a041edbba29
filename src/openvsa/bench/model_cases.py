"""Whole models to measure: the configurations of released ones, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, require

__all__ = ["MODELS", "ModelCase", "find_models"]

Inputs = dict[str, Any]
Make = Callable[[tuple[int, int, int], Mapping[str, Any], Callable[..., Tensor]], Inputs]

# A lattice so small that a forward over it takes the device no time to speak of: what is left is the host's.
SMALL_GRID = (2, 6, 8)


@dataclass(frozen=True)
class ModelCase:
    """A Diffusers transformer and one denoising step of it.

    Args:
        transformer: the name of its class.
        config: what differs from the defaults of the class, which are a released model's.
        whole: blocks of the released model where `config` has fewer, for a note in the results.
        grid: tokens of the lattice along (T, H, W).
        inputs: makes the arguments of the forward from a lattice, the config and a maker of random tensors.
        note: what this is.
        target: how many times as fast as dense a step at density 0.1 should be, None if nothing was promised.
    """

    name: str
    transformer: str
    grid: tuple[int, int, int]
    inputs: Make
    note: str
    config: Mapping[str, Any] = field(default_factory=dict)
    whole: str = ""
    target: float | None = None
    device_type: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device_type == "cuda" else torch.float32

    def build(self, device: torch.device) -> Any:
        """The transformer with random weights, made on the device. What `from_pretrained` would keep in fp32 is."""
        diffusers = require("diffusers", extra="diffusers")
        kind = getattr(diffusers, self.transformer)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                model = kind(**self.config)
        finally:
            torch.set_default_dtype(before)
        precise = set(kind._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            if precise & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)

    def arguments(self, model: Any, device: torch.device, grid: tuple[int, int, int] | None = None) -> Inputs:
        """What the forward is called with, over the lattice of the case or another one."""
        generator = torch.Generator(device).manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        made = self.inputs(grid or self.grid, model.config, noise)
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in made.items()}

    def describe(self, model: Any) -> dict[str, Any]:
        """The numbers of the case, for a result file."""
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "transformer": self.transformer, "grid": self.grid, "parameters": parameters,
            "dtype": str(self.dtype).removeprefix("torch."), "config": dict(self.config), "whole": self.whole,
            "note": self.note, "target": self.target,
        }  # fmt: skip


def _wan(grid: tuple[int, int, int], config: Any, noise: Callable[..., Tensor]) -> Inputs:
    sides = [n * p for n, p in zip(grid, config["patch_size"], strict=True)]
    return {
        "hidden_states": noise(1, config["in_channels"], *sides),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 512, config["text_dim"]),
    }


def _hunyuan_video(grid: tuple[int, int, int], config: Any, noise: Callable[..., Tensor]) -> Inputs:
    p = config["patch_size"]
    return {
        "hidden_states": noise(1, config["in_channels"], grid[0] * config["patch_size_t"], grid[1] * p, grid[2] * p),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.long),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "guidance": noise(1).abs() * 6000,
    }


def _ltx(grid: tuple[int, int, int], config: Any, noise: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": noise(1, grid[0] * grid[1] * grid[2], config["in_channels"]),
        "encoder_hidden_states": noise(1, 128, config["caption_channels"]),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 128, dtype=torch.long),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
    }


# Configurations: `transformer/config.json` of the repositories Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers,
# hunyuanvideo-community/HunyuanVideo and Lightricks/LTX-Video on the Hugging Face hub. The classes of Wan, HunyuanVideo
# and LTX-Video have those of the 14B, the 13B and the 2B model as their defaults.
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_TINY_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip

_ALL = (
    ModelCase("wan-1.3b-480p", "WanTransformer3DModel", (21, 30, 52), _wan,
              "Wan 2.1 1.3B, 480 x 832, 81 frames", _WAN_SMALL, target=1.6),
    ModelCase("wan-1.3b-720p", "WanTransformer3DModel", (21, 45, 80), _wan,
              "Wan 2.1 1.3B, 720 x 1280, 81 frames", _WAN_SMALL, target=2.2),
    ModelCase("wan-14b-720p", "WanTransformer3DModel", (21, 45, 80), _wan,
              "Wan 2.1 14B, 720 x 1280, 81 frames", {"num_layers": 4}, "40 blocks", target=2.2),
    ModelCase("hunyuan-720p", "HunyuanVideoTransformer3DModel", (33, 45, 80), _hunyuan_video,
              "HunyuanVideo 13B, 720 x 1280, 129 frames, 256 text tokens, all valid",
              {"num_layers": 2, "num_single_layers": 4, "num_refiner_layers": 1}, "20 + 40 blocks", target=2.2),
    ModelCase("ltx", "LTXVideoTransformer3DModel", (21, 16, 22), _ltx,
              "LTX-Video 2B, 512 x 704, 161 frames"),
    ModelCase("tiny-wan", "WanTransformer3DModel", (3, 10, 12), _wan, "seconds on any machine", _TINY_WAN,
              device_type="cpu"),
)  # fmt: skip
MODELS = {case.name: case for case in _ALL}


def find_models(names: list[str], device_type: str) -> list[ModelCase]:
    """The cases of these names; "all" stands for every one of this type of device.

    Raises:
        OpenVSAError: there is no such case, or it is not for this type of device.
    """
    here = [case for case in MODELS.values() if case.device_type == device_type]
    if names == ["all"]:
        return here
    for name in names:
        if name not in MODELS:
            raise OpenVSAError(f"there is no model case {name!r}; choose from {', '.join(MODELS)}, or all")
        if MODELS[name] not in here:
            raise OpenVSAError(
                f"the model case {name!r} is measured on {MODELS[name].device_type}, not on {device_type}; on "
                f"{device_type} there is {', '.join(case.name for case in here)}"
            )
    return [MODELS[name] for name in names]
