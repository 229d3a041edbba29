"""`openvsa generate --model`: any supported Diffusers pipeline, with full and with sparse attention."""

from __future__ import annotations

import inspect
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
    command,
    describe,
    make_pair,
    shown_steps,
    versions,
)
from openvsa.errors import OpenVSAError, ShapeError, UnsupportedError, require

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
    density: float,
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: float | None,
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
    from openvsa.evaluate import Settings, check_output_folder

    where = available(device)
    kind = _pipeline_class(model)
    asks = inspect.signature(kind.__call__).parameters
    steps = _default(asks, "num_inference_steps") if steps is None else steps
    if steps is None:
        raise OpenVSAError(f"{kind.__name__} has no number of steps of its own; give --steps")
    check_numbers(density, seed, steps)
    sizes = {"height": height, "width": width, "num_frames": frames}
    given = _arguments(kind, asks, prompt, image, sizes)
    rates = (fps, _default(asks, "frame_rate"), _default(asks, "fps"), _FPS)
    rate = next(float(value) for value in rates if value is not None)
    given |= {name: rate for name in ("frame_rate", "fps") if name in asks}
    if rate <= 0:
        raise OpenVSAError(f"--fps must be above 0, got {fps}")
    check_output_folder(out)

    pipe = _load(kind, model, where)
    options = {"--image": image, "--density": density, "--steps": steps, "--height": height, "--width": width}
    options |= {"--frames": frames, "--fps": fps, "--seed": seed, "--device": device, "--out": out}
    settings = Settings(
        scene=shorten(prompt or model, 90, placeholder=" …"),
        seed=seed,
        steps=steps,
        density=density,
        fps=rate,
        device=describe(where),
        threads=torch.get_num_threads(),
        command=command(["--model", model, "--prompt", prompt or ""], options),
        versions=versions(),
        credit="",
        model=model,
    )
    clips = _Clips(pipe, given, seed, "callback_on_step_end" in asks)
    return make_pair(pipe, clips, settings, lambda dense: _recorder(steps, dense), out, console or Console())


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
        output = self.pipe(**options)
        if callback_on_step_end is not None and not self.tells_steps:
            for _ in range(num_inference_steps):
                callback_on_step_end()
        return _clip_of(output)


def _telling(callback: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Diffusers takes the tensors back that it gives a callback."""

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        callback()
        return tensors

    return tell


def _clip_of(output: Any) -> Tensor:
    """The first video, or the first image, of a pipeline's output."""
    videos = getattr(output, "frames", None)
    if videos is not None:
        pixels = torch.as_tensor(videos[0])
    else:
        pixels = torch.as_tensor(output.images if hasattr(output, "images") else output.image)[:1]
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ShapeError(f"expected frames [frames, height, width, 3] from the pipeline, got {list(pixels.shape)}")
    if not pixels.isfinite().all():
        raise OpenVSAError("the pipeline made frames that are not finite numbers; its weights may not suit this dtype")
    pixels = (255 * pixels.float()).round().clamp(0, 255).to(torch.uint8)
    # H.264 needs an even height and width.
    return pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2].contiguous()


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


def _pipeline_class(model: str) -> Any:
    """The Diffusers class of a pipeline, from its index alone.

    Raises:
        OpenVSAError: there is no pipeline of that name, or its class is not Diffusers' own.
        UnsupportedError: its transformer is of no supported family.
    """
    import diffusers

    from openvsa.integrations.families import supported

    try:
        index: Any = diffusers.DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise OpenVSAError(
            "--model must be a folder with a Diffusers pipeline or the name of one on the Hugging Face hub; the "
            f"model_index.json of {model!r} cannot be read: {error}"
        ) from None
    name = index.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise OpenVSAError(
            f"{model!r} is a {name}, which Diffusers {diffusers.__version__} does not have; a newer one may, and for a "
            "pipeline with code of its own use openvsa.sparsify in Python"
        )
    _, transformer = index.get("transformer") or (None, None)
    bases = getattr(diffusers, str(transformer), object).__mro__
    if not {base.__name__ for base in bases} & set(supported()):
        raise UnsupportedError(
            f"{model!r} is a {name} whose transformer is {transformer or 'absent'}; supported transformers: "
            f"{', '.join(supported())}",
            {},
        )
    return kind


def _arguments(
    kind: Any, asks: Mapping[str, Any], prompt: str | None, image: Path | None, sizes: Mapping[str, int | None]
) -> dict[str, Any]:
    """What the pipeline is called with.

    Raises:
        OpenVSAError: it does not take an option that was given, or needs what `generate` cannot give.
    """
    if prompt is None:
        raise OpenVSAError("--model needs --prompt, the text to make a video of")
    given: dict[str, Any] = {"prompt": prompt} | {name: size for name, size in sizes.items() if size is not None}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise OpenVSAError(f"{_option(name)} must be at least 1, got {size}")
    if image is not None:
        given["image"] = _read(image, sizes)
    for name in given:
        if name not in asks:
            raise OpenVSAError(f"{kind.__name__} takes no {name}: leave {_option(name)} out")
    missing = [name for name, p in asks.items() if p.default is p.empty and name not in {"self", *given}]
    missing = [name for name in missing if asks[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if missing == ["image"]:
        raise OpenVSAError(f"{kind.__name__} continues a picture: give one with --image")
    if missing:
        raise OpenVSAError(f"{kind.__name__} needs {', '.join(missing)}, which this command cannot give; use Python")
    return given


def _option(argument: str) -> str:
    return {"num_frames": "--frames"}.get(argument, f"--{argument}")


def _read(path: Path, sizes: Mapping[str, int | None]) -> Any:
    """A PIL image, scaled and cut around its centre where a size is given."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise OpenVSAError(f"cannot read the image {str(path)!r}: {error}") from None
    width, height = sizes["width"], sizes["height"]
    return ImageOps.fit(image, (width, height)) if width and height else image


def _load(kind: Any, model: str, device: torch.device) -> Any:
    """In fp32 on a CPU and in bf16 on a GPU."""
    try:
        pipe = kind.from_pretrained(model, torch_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        raise OpenVSAError(f"cannot load {model!r}: {error}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _default(asks: Mapping[str, Any], name: str) -> Any:
    """The default of an argument, None if it has none."""
    default = asks[name].default if name in asks else None
    return default if isinstance(default, int | float) else None
