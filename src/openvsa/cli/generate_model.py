"""`openvsa generate --model`: any supported Diffusers pipeline, with full and with sparse attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from openvsa.cli.generate_pair import (
    PACKAGES,
    available,
    check_numbers,
    check_output,
    command,
    describe,
    make_pair,
    shown_steps,
    sparsity,
    versions,
)
from openvsa.cli.pipelines import arguments, call, clip_of, load, pipeline_class
from openvsa.errors import OpenVSAError, require

if TYPE_CHECKING:
    from openvsa.evaluate import AttentionRecorder
    from openvsa.integrations.report import SparsityReport

__all__ = ["run_generate_model"]

_PICTURE_BYTES = 16 << 20
_PICTURE_LAYERS = 6
_FPS = 16.0
"""Of the file, for pipelines that do not ask for a frame rate."""


def run_generate_model(
    *,
    model: str,
    prompt: str | None,
    image: Path | None,
    density: float | None,
    config: str | None,
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: float | None,
    guidance_scale: float | None,
    seed: int,
    device: str,
    out: Path,
    console: Console | None = None,
) -> Path:
    """Makes both clips and the report, and returns the path of its page.

    The arguments, and that the pipeline can be sparse, are checked before its weights are downloaded or loaded. What is
    None is left to the pipeline.

    Raises:
        OpenVSAError: an argument is wrong or does not suit the pipeline, or it cannot be loaded.
        UnsupportedError: the pipeline's transformer is of no supported family.
    """
    for package in PACKAGES:
        require(package, extra="demo")
    from openvsa.evaluate import Settings

    where = available(device)
    kind = pipeline_class(model)
    asks = inspect.signature(kind.__call__).parameters
    steps = _default(asks, "num_inference_steps") if steps is None else steps
    if steps is None:
        raise OpenVSAError(f"{kind.__name__} has no number of steps of its own; give --steps")
    check_numbers(seed, steps)
    sparse_as = sparsity(density, config, steps)
    numbers = {"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance_scale}
    given = arguments(kind, asks, prompt, image, numbers)
    rates = (fps, _default(asks, "frame_rate"), _default(asks, "fps"), _FPS)
    rate = next(float(value) for value in rates if value is not None)
    given |= {name: rate for name in ("frame_rate", "fps") if name in asks}
    if not 0 < rate < math.inf:
        raise OpenVSAError(f"--fps must be above 0 and finite, got {fps}")
    check_output(out, config, image)

    pipe = load(kind, model, where)
    options = {
        "--image": image,
        "--density": None if config else sparse_as.density,
        "--config": config,
        "--steps": steps,
        "--height": height,
        "--width": width,
    }
    options |= {"--frames": frames, "--fps": fps, "--guidance-scale": guidance_scale}
    options |= {"--seed": seed, "--device": device, "--out": out}
    settings = Settings(
        scene=shorten(prompt or model, 90, placeholder=" …"),
        seed=seed,
        steps=steps,
        density=sparse_as.base.keep_ratio,
        fps=rate,
        device=describe(where),
        threads=torch.get_num_threads(),
        command=command(["--model", model, "--prompt", prompt or ""], options),
        versions=versions(),
        credit="",
        model=model,
        sparsity=sparse_as.to_dict(),
    )
    clips = _Clips(pipe, given, seed, "callback_on_step_end" in asks)
    return make_pair(pipe, clips, settings, sparse_as, lambda dense: _recorder(steps, dense), out, console or Console())


@dataclass(frozen=True)
class _Clips:
    """Makes a clip, uint8 [frames, height, width, 3], always from the same noise. An image is a clip of one frame."""

    pipe: Any
    given: Mapping[str, Any]
    seed: int
    tells_steps: bool

    def __call__(self, num_inference_steps: int, callback_on_step_end: Callable[..., None] | None = None) -> Tensor:
        options = dict(self.given) | {"num_inference_steps": num_inference_steps, "output_type": "np"}
        # Drawn on the CPU, so that every device starts from the same noise.
        options["generator"] = torch.Generator().manual_seed(self.seed)
        if callback_on_step_end is not None and self.tells_steps:
            options["callback_on_step_end"] = _telling(callback_on_step_end)
        output = call(self.pipe, **options)
        if callback_on_step_end is not None and not self.tells_steps:
            for _ in range(num_inference_steps):
                callback_on_step_end()
        return clip_of(output)


def _telling(callback: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Diffusers takes the tensors back that it gives a callback."""

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        callback()
        return tensors

    return tell


def _recorder(steps: int, dense: SparsityReport) -> AttentionRecorder:
    """As many layers and heads as fit in the page: a large model has thousands of tiles, and a map has them squared."""
    from openvsa.evaluate.recorder import AttentionRecorder, evenly

    shown = shown_steps(steps)
    blocks = max((layer.num_blocks for layer in dense.layers), default=1)
    maps = _PICTURE_BYTES // (blocks * (blocks + -(-blocks // 8) + 1)) // len(shown)
    layers = evenly(len(dense.layers), min(maps, _PICTURE_LAYERS)) if maps and dense.layers else ()
    names = [dense.layers[index].layer for index in layers]
    heads = maps // len(names) if names else 1
    return AttentionRecorder(shown, layers=names, max_heads=heads, max_bytes=_PICTURE_BYTES)


def _default(asks: Mapping[str, Any], name: str) -> Any:
    """The default of an argument, None if it has none."""
    default = asks[name].default if name in asks else None
    return default if isinstance(default, int | float) else None
