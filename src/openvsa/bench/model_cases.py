"""Whole models to measure: the configurations of released ones, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openvsa.bench import model_inputs as call
from openvsa.bench.model_inputs import Inputs, Make
from openvsa.errors import OpenVSAError, require

__all__ = ["MODELS", "ModelCase", "find_models"]

# A lattice so small that a forward over it takes the device no time to speak of: what is left is the host's.
SMALL_GRID = (2, 6, 8)


@dataclass(frozen=True)
class ModelCase:
    """A Diffusers transformer and one denoising step of it.

    Args:
        transformer: the name of its class.
        config: what differs from the defaults of the class, which are a released model's.
        grid: tokens of the lattice along (T, H, W), or (H, W) for images.
        inputs: makes the arguments of the forward from a lattice, the config and a maker of random tensors.
        note: what this is.
        target: how many times as fast as dense a step at density 0.1 should be, None if nothing was promised.
    """

    name: str
    transformer: str
    grid: tuple[int, ...]
    inputs: Make
    note: str
    config: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    device_type: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device_type == "cuda" else torch.float32

    def build(self, device: torch.device) -> Any:
        """The transformer with random weights, made on the device. What `from_pretrained` keeps in fp32 is in fp32."""
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
            if parameter.dim() > 1 and not parameter.any():
                # Modulations that begin at zero switch their blocks off.
                torch.nn.init.normal_(parameter.data, std=0.02)
        return model.eval().requires_grad_(False)

    def arguments(self, model: Any, device: torch.device, grid: tuple[int, ...] | None = None) -> Inputs:
        """What the forward is called with, over the lattice of the case or another one."""
        generator = torch.Generator(device).manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        made = self.inputs(grid or self.grid, model.config, noise)
        return {name: _to(x, device) for name, x in made.items()}

    def describe(self, model: Any) -> dict[str, Any]:
        """The numbers of the case, for a result file."""
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "transformer": self.transformer, "grid": self.grid, "parameters": parameters,
            "dtype": str(self.dtype).removeprefix("torch."), "config": dict(self.config),
            "note": self.note, "target": self.target,
        }  # fmt: skip


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_to(x, device) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


# Configurations: `transformer/config.json` of the repositories Wan-AI/Wan2.1-T2V-1.3B-Diffusers, -T2V-14B-Diffusers,
# -I2V-14B-720P-Diffusers and -VACE-1.3B-diffusers, Wan-AI/Wan2.2-TI2V-5B-Diffusers, Lightricks/LTX-Video,
# hunyuanvideo-community/HunyuanVideo and THUDM/CogVideoX-5b on the Hugging Face hub. The classes have the configuration
# of the 14B Wan, and of HunyuanVideo 1.0 and 1.5, LTX-Video and LTX-2, Mochi and FLUX.1 as their defaults; of Cosmos
# and Kandinsky 5 the defaults of the classes are taken, whatever was released.
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_TINY_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip

_ALL = (
    ModelCase("wan-1.3b-480p", "WanTransformer3DModel", (21, 30, 52), call.wan,
              "Wan 2.1 1.3B, 480 x 832, 81 frames", _WAN_SMALL, target=1.6),
    ModelCase("wan-1.3b-720p", "WanTransformer3DModel", (21, 45, 80), call.wan,
              "Wan 2.1 1.3B, 720 x 1280, 81 frames", _WAN_SMALL, target=2.2),
    ModelCase("wan-14b-720p", "WanTransformer3DModel", (21, 45, 80), call.wan,
              "Wan 2.1 14B, 720 x 1280, 81 frames", target=2.2),
    ModelCase("wan-i2v-14b-720p", "WanTransformer3DModel", (21, 45, 80), call.wan_image_to_video,
              "Wan 2.1 14B image to video, 720 x 1280, 81 frames",
              {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    ModelCase("wan-vace-1.3b-480p", "WanVACETransformer3DModel", (21, 30, 52), call.wan_vace,
              "Wan 2.1 VACE 1.3B, 480 x 832, 81 frames, a control video",
              {**_WAN_SMALL, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}),
    ModelCase("wan2.2-5b-720p", "WanTransformer3DModel", (31, 22, 40), call.wan_by_token,
              "Wan 2.2 5B, 704 x 1280, 121 frames, a noise level for each token",
              {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}),
    ModelCase("hunyuan-720p", "HunyuanVideoTransformer3DModel", (33, 45, 80), call.hunyuan_video,
              "HunyuanVideo 13B, 720 x 1280, 129 frames, 256 text tokens", target=2.2),
    ModelCase("hunyuan15-720p", "HunyuanVideo15Transformer3DModel", (31, 45, 80), call.hunyuan_video15,
              "HunyuanVideo-1.5, 720 x 1280, 121 frames, with an image"),
    ModelCase("ltx", "LTXVideoTransformer3DModel", (21, 16, 22), call.ltx, "LTX-Video 2B, 512 x 704, 161 frames"),
    ModelCase("ltx2-1080p", "LTX2VideoTransformer3DModel", (16, 34, 60), call.ltx2,
              "LTX-2, 1088 x 1920, 121 frames, with sound"),
    ModelCase("cogvideox-480p", "CogVideoXTransformer3DModel", (13, 30, 45), call.cogvideox,
              "CogVideoX 5B, 480 x 720, 49 frames",
              {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}),
    ModelCase("mochi-480p", "MochiTransformer3DModel", (28, 30, 53), call.mochi,
              "Mochi, 480 x 848, 163 frames"),
    ModelCase("cosmos-720p", "CosmosTransformer3DModel", (16, 44, 80), call.cosmos,
              "Cosmos, 704 x 1280, 121 frames", {"concat_padding_mask": False}),
    ModelCase("kandinsky5-512p", "Kandinsky5Transformer3DModel", (31, 32, 48), call.kandinsky5,
              "Kandinsky 5, 512 x 768, 121 frames"),
    ModelCase("flux-2048", "FluxTransformer2DModel", (128, 128), call.flux,
              "FLUX.1, 2048 x 2048", {"guidance_embeds": True}),
    ModelCase("tiny-wan", "WanTransformer3DModel", (3, 10, 12), call.wan, "seconds on any machine", _TINY_WAN,
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
