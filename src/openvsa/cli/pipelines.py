"""Any supported Diffusers pipeline: found by its index, asked for what it needs, loaded, and its output as a clip."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError, UnsupportedError

__all__ = ["arguments", "call", "clip_of", "load", "pipeline_class"]


# What FastVideo's FastWan checkpoints call their pipeline, and the one in Diffusers of the same parts, whose sampler is
# another.
_SAME = {"WanDMDPipeline": "WanPipeline"}


def pipeline_class(model: str) -> Any:
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
            "the model must be a folder with a Diffusers pipeline or the name of one on the Hugging Face hub; the "
            f"model_index.json of {model!r} cannot be read: {error}"
        ) from None
    name = index.get("_class_name")
    kind = getattr(diffusers, _SAME.get(str(name), str(name)), None)
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
            f"{', '.join(supported())}"
        )
    return kind


def arguments(
    kind: Any,
    asks: Mapping[str, Any],
    prompt: str | None,
    image: Path | None,
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """What the pipeline is called with. Numbers are `height`, `width`, `num_frames` and `guidance_scale`, or None.

    Raises:
        OpenVSAError: it does not take an option that was given, or needs what `generate` cannot give.
    """
    if prompt is None:
        raise OpenVSAError(f"{kind.__name__} needs --prompt, the text to make a video of")
    given: dict[str, Any] = {"prompt": prompt} | {
        name: number for name, number in numbers.items() if number is not None
    }
    for name, number in numbers.items():
        least, bound = (0, "0 and finite") if name == "guidance_scale" else (1, "1")
        if number is not None and not least <= number < math.inf:
            raise OpenVSAError(f"{_option(name)} must be at least {bound}, got {number}")
    if image is not None:
        given["image"] = _read(image, numbers)
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
    return {"num_frames": "--frames"}.get(argument, f"--{argument.replace('_', '-')}")


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


def load(kind: Any, model: str, device: torch.device) -> Any:
    """In fp32 on a CPU and in bf16 on a GPU. A Wan model that was trained with VSA gets its branch weights, which
    Diffusers leaves out, and says so."""
    from openvsa.integrations.branch import load_branch
    from openvsa.integrations.checkpoint import has_branch

    try:
        folder = Path(model) if Path(model).is_dir() else Path(kind.download(model))
        pipe = kind.from_pretrained(folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        raise OpenVSAError(f"cannot load {model!r}: {error}") from error
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name, None)
        if type(transformer).__name__ == "WanTransformer3DModel" and has_branch(folder / name):
            load_branch(transformer, folder / name)
            print(f"{name}: trained with VSA; its compressed branch is computed in sparse calls")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **options: Any) -> Any:
    """The output of a pipeline.

    Raises:
        OpenVSAError: it does not take these arguments, a height that is no multiple of 16, say.
    """
    if type(pipe).__name__ == "MochiPipeline" and options.get("num_inference_steps", 2) < 2:
        raise OpenVSAError("a schedule of Mochi has at least 2 steps, got 1; give --steps")
    try:
        return pipe(**options)
    except OpenVSAError:
        raise
    except ValueError as error:  # how Diffusers' pipelines refuse
        raise OpenVSAError(f"{type(pipe).__name__} refuses what it was given: {error}") from error


def clip_of(output: Any) -> Tensor:
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
