"""`openvsa generate`: one clip with full attention, the same clip with sparse attention, and a page about both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

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
from openvsa.errors import OpenVSAError, require

if TYPE_CHECKING:
    from openvsa.models import ClipPipeline

__all__ = ["is_clip_model", "load_clip_model", "print_scenes", "run_generate", "start"]

_CREDIT = (
    'The model was trained on the film "Big Buck Bunny", from which the scenes are taken, (c) copyright 2008, '
    "Blender Foundation / www.bigbuckbunny.org, Creative Commons Attribution 3.0."
)


def run_generate(
    *,
    model: str | None = None,
    scene: str | None,
    image: Path | None,
    density: float | None,
    config: str | None,
    seed: int,
    steps: int,
    device: str,
    out: Path,
    console: Console | None = None,
) -> Path:
    """Makes both clips and the report, and returns the path of its page. Every argument is checked before any work.

    Args:
        model: a folder that `openvsa train` made; None is the bundled model.

    Raises:
        OpenVSAError: an argument is wrong, a package is missing, or the weights are damaged.
    """
    for package in PACKAGES:
        require(package, extra="demo")
    from openvsa.evaluate import AttentionRecorder, Settings

    check_numbers(seed, steps)
    sparse_as = sparsity(density, config, steps)
    where = available(device)
    pipe = load_clip_model(model, where)
    title, choice, begin = start(pipe, scene, image)
    check_output(out, config, image)
    make_clip = partial(pipe, **begin, seed=seed)
    options = {
        "--density": None if config else sparse_as.density,
        "--config": config,
        "--seed": seed,
        "--steps": steps,
        "--device": device,
        "--out": out,
    }
    settings = Settings(
        scene=title,
        seed=seed,
        steps=steps,
        density=sparse_as.base.keep_ratio,
        fps=pipe.fps,
        device=describe(where),
        threads=torch.get_num_threads(),
        command=command([*(["--model", model] if model else []), *choice], options),
        versions=versions(),
        credit=_CREDIT,
        model=model,
        sparsity=sparse_as.to_dict(),
    )

    recorder = AttentionRecorder(shown_steps(steps))
    return make_pair(pipe, make_clip, settings, sparse_as, lambda _: recorder, out, console or Console())


def print_scenes(console: Console | None = None) -> None:
    """Prints the scenes that can be continued by name."""
    require("diffusers", extra="demo")
    from openvsa.models import bundled_scenes

    table = Table("scene", "what it shows", "shot")
    for scene in bundled_scenes():
        table.add_row(scene.name, scene.title, "not seen in training" if scene.held_out else "seen in training")
    (console or Console()).print(table)


def is_clip_model(model: str) -> bool:
    """Whether this is a folder that `openvsa train` made, and no Diffusers pipeline."""
    return (Path(model) / "manifest.json").is_file()


def load_clip_model(model: str | None, device: torch.device) -> ClipPipeline:
    """The bundled model, or one that `openvsa train` made: in fp32 on a CPU and in bf16 on a GPU.

    Raises:
        OpenVSAError: its weights are missing or damaged.
    """
    from openvsa import models

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = models.load_bundled(device, dtype) if model is None else models.load_pipeline(Path(model), device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(pipe: ClipPipeline, scene: str | None, image: Path | None) -> tuple[str, list[str], dict[str, Any]]:
    """What the clips continue: its title, the option that chooses it, and the argument of the pipeline."""
    from openvsa.models.scenes import read_image

    if scene is not None and image is not None:
        raise OpenVSAError("give either --scene or --image, not both")
    if image is not None:
        return image.stem, ["--image", str(image)], {"image": read_image(image, pipe.frame_size)}
    chosen = pipe.scenes[0] if scene is None else pipe.find_scene(scene)
    return chosen.title, ["--scene", chosen.name], {"scene": chosen.name}
