"""From a start frame to a clip: a Diffusers pipeline around a small Wan transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError
from openvsa.models.scenes import Scene
from openvsa.models.shots import UNKNOWN_SHOT, ShotTokens
from openvsa.models.tokenizer import PatchTokenizer
from openvsa.models.velocity import predict_velocity

__all__ = ["ClipPipeline"]


class ClipPipeline(DiffusionPipeline):
    """Continues a start frame into a clip of a fixed length.

    The transformer generates the change against the start frame (see `openvsa.models.velocity`), which is decoded and
    added to it, so a clip begins with the very frame it was given. `frame_size` is (height, width) in pixels.
    """

    transformer: WanTransformer3DModel
    scheduler: Any  # a FlowMatchEulerDiscreteScheduler, whose annotations are narrower than what it takes
    tokenizer: PatchTokenizer
    shot_tokens: ShotTokens

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer: PatchTokenizer,
        shot_tokens: ShotTokens,
        scenes: Sequence[Scene] = (),
        frame_size: tuple[int, int] = (144, 256),
        fps: float = 12.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, shot_tokens=shot_tokens
        )
        self.scenes = tuple(scenes)
        self.frame_size = frame_size
        self.fps = fps

    @property
    def num_frames(self) -> int:
        return self.tokenizer.change_std.shape[1] * self.tokenizer.cell[0]

    def find_scene(self, name: str) -> Scene:
        """Raises `OpenVSAError`, listing the accepted names, when there is no such scene."""
        for scene in self.scenes:
            if scene.name == name:
                return scene
        raise OpenVSAError(f"there is no scene {name!r}; choose one of: {', '.join(s.name for s in self.scenes)}")

    @torch.no_grad()
    def __call__(
        self,
        scene: str | None = None,
        image: Tensor | None = None,
        seed: int = 0,
        num_inference_steps: int = 16,
        callback_on_step_end: Callable[[ClipPipeline, int, Tensor, dict[str, Any]], Any] | None = None,
    ) -> Tensor:
        """A clip, uint8 `[frames, height, width, 3]` on the CPU, that begins with a scene's start frame or an image.

        Args:
            scene: the name of one of `scenes`.
            image: a start frame of one's own instead, uint8 `[height, width, 3]`.
            seed: of the noise. It is drawn on the CPU, so that every device starts from the same.
            num_inference_steps: Euler steps.
            callback_on_step_end: called as in Diffusers with (pipeline, step, timestep, {"latents": ...}).

        Raises:
            OpenVSAError: neither or both of `scene` and `image` are given, or there is no such scene.
            ShapeError: `image` has another type or size than the model generates.
        """
        if (scene is None) == (image is None):
            raise OpenVSAError("give either the name of a scene or a start frame of your own, not both or neither")
        if num_inference_steps < 1:
            raise OpenVSAError(f"a clip needs at least one step, got {num_inference_steps}")
        row = UNKNOWN_SHOT
        if scene is not None:
            chosen = self.find_scene(scene)
            row, image = chosen.row, chosen.start_frame(self.frame_size)
        device = self.transformer.device
        frame = self._checked(image).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
        still = self.tokenizer.encode_still(frame)
        tokens = self.shot_tokens(torch.tensor([row], device=device))

        channels, time = self.tokenizer.change_std.shape
        shape = (1, channels, time, *still.shape[3:])
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        progress: Any = self.progress_bar
        for step, timestep in enumerate(progress(self.scheduler.timesteps)):
            sigma = (timestep / self.scheduler.config.num_train_timesteps).expand(1)
            velocity = predict_velocity(self.transformer, self.tokenizer, latents, sigma, still, tokens)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {"latents": latents})

        # The tokenizer is linear: this is the start frame, untouched, plus the decoded change.
        video = frame.unsqueeze(2) + self.tokenizer.decode(still + latents) - self.tokenizer.decode(still.expand(shape))
        video[:, :, 0] = frame
        return ((video[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()

    def _checked(self, image: Tensor | None) -> Tensor:
        size = (*self.frame_size, 3)
        if image is None or image.dtype != torch.uint8 or tuple(image.shape) != size:
            got = None if image is None else f"{image.dtype} {list(image.shape)}"
            raise ShapeError(f"a start frame is a uint8 tensor {list(size)}, got {got}")
        return image
