"""`openvsa generate`: one clip with full attention, the same clip with sparse attention, and a page about both."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from openvsa.config import Budget
from openvsa.errors import OpenVSAError, require

if TYPE_CHECKING:
    from openvsa.evaluate import AttentionRecorder, Comparison, Figures, Settings
    from openvsa.integrations.diffusers import SparseHandle
    from openvsa.integrations.report import SparsityReport
    from openvsa.models import ClipPipeline

__all__ = ["print_scenes", "run_generate"]

_PACKAGES = ("diffusers", "av", "numpy", "PIL", "jinja2", "torchmetrics")
_CREDIT = (
    'The model was trained on the film "Big Buck Bunny", from which the scenes are taken, (c) copyright 2008, '
    "Blender Foundation / www.bigbuckbunny.org, Creative Commons Attribution 3.0."
)


@dataclass(frozen=True)
class TimedClip:
    """A clip uint8 [frames, height, width, 3], the wall seconds it took, and what its attention layers did."""

    clip: Tensor
    seconds: float
    attention: SparsityReport


def run_generate(
    *,
    scene: str | None,
    image: Path | None,
    density: float,
    seed: int,
    steps: int,
    device: str,
    out: Path,
    console: Console | None = None,
) -> Path:
    """Makes both clips and the report, and returns the path of its page. Every argument is checked before any work.

    Raises:
        OpenVSAError: an argument is wrong, a package is missing, or the weights are damaged.
    """
    for package in _PACKAGES:
        require(package, extra="demo")
    from openvsa.evaluate import AttentionRecorder, Settings, check_output_folder, write_report
    from openvsa.integrations.diffusers import observe, sparsify
    from openvsa.models import load_bundled

    _check_numbers(density, seed, steps)
    where = _available(device)
    pipe = load_bundled(where, torch.float32 if where.type == "cpu" else torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    title, choice, start = _start(pipe, scene, image)
    check_output_folder(out)
    make_clip = partial(pipe, **start, seed=seed)
    options = {"--density": density, "--seed": seed, "--steps": steps, "--device": device, "--out": out}
    settings = Settings(
        scene=title,
        seed=seed,
        steps=steps,
        density=density,
        fps=pipe.fps,
        device=_describe(where),
        threads=torch.get_num_threads(),
        command=shlex.join(["openvsa", "generate", *choice, *(str(word) for pair in options.items() for word in pair)]),
        versions=_versions(),
        credit=_CREDIT,
    )

    console = console or Console()
    recorder = AttentionRecorder({0, steps // 3, 2 * steps // 3, steps - 1})
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn once a step: a drawing thread would take its share of the processor from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:

        def bar(description: str, total: int) -> Callable[..., None]:
            task = progress.add_task(description, total=total)
            progress.refresh()
            return lambda *_: progress.update(task, advance=1, refresh=True)

        dense = _timed(make_clip, partial(observe, pipe), steps, bar("full attention", steps))
        sparse = _timed(make_clip, partial(sparsify, pipe, density), steps, bar("sparse attention", steps), recorder)
        done = bar("report", 1)
        comparison = _compare(settings, dense, sparse, recorder)
        page = write_report(comparison, out)
        done()
    console.print(_summary(comparison.figures, page), highlight=False, soft_wrap=True)
    return page


def print_scenes(console: Console | None = None) -> None:
    """Prints the scenes that can be continued by name."""
    require("diffusers", extra="demo")
    from openvsa.models import bundled_scenes

    table = Table("scene", "what it shows", "shot")
    for scene in bundled_scenes():
        table.add_row(scene.name, scene.title, "not seen in training" if scene.held_out else "seen in training")
    (console or Console()).print(table)


def _check_numbers(density: float, seed: int, steps: int) -> None:
    Budget(keep_ratio=density)
    if steps < 1:
        raise OpenVSAError(f"--steps must be at least 1, got {steps}")
    if not 0 <= seed < 2**63:
        raise OpenVSAError(f"--seed must be at least 0 and below 2^63, got {seed}")


def _available(name: str) -> torch.device:
    """The device of that name, if torch has it here."""
    accepted = "--device must be cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OpenVSAError(f"{accepted}, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise OpenVSAError(f"{accepted}, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OpenVSAError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def _start(pipe: ClipPipeline, scene: str | None, image: Path | None) -> tuple[str, list[str], dict[str, Any]]:
    """What the clips continue: its title, the option that chooses it, and the argument of the pipeline."""
    from openvsa.models.scenes import read_image

    if scene is not None and image is not None:
        raise OpenVSAError("give either --scene or --image, not both")
    if image is not None:
        return image.stem, ["--image", str(image)], {"image": read_image(image, pipe.frame_size)}
    chosen = pipe.scenes[0] if scene is None else pipe.find_scene(scene)
    return chosen.title, ["--scene", chosen.name], {"scene": chosen.name}


def _timed(
    make_clip: Callable[..., Tensor],
    attach: Callable[[], SparseHandle],
    steps: int,
    on_step: Callable[..., None],
    recorder: AttentionRecorder | None = None,
) -> TimedClip:
    """One untimed step first, because the first use of every kernel and buffer is slower than the rest."""
    with attach():
        make_clip(num_inference_steps=1)
    with attach() as handle:
        if recorder is not None:
            handle.on_attention(recorder)
        begin = time.perf_counter()
        clip = make_clip(num_inference_steps=steps, callback_on_step_end=on_step)
        seconds = time.perf_counter() - begin
        return TimedClip(clip, seconds, handle.report())


def _compare(settings: Settings, dense: TimedClip, sparse: TimedClip, recorder: AttentionRecorder) -> Comparison:
    from openvsa.evaluate import Comparison, Figures, LayerFigures, PassTime, compare_clips

    layers = tuple(
        LayerFigures(ours.layer, ours.name, ours.delivered_density, full.attention_seconds, ours.attention_seconds)
        for full, ours in zip(dense.attention.layers, sparse.attention.layers, strict=True)
    )
    figures = Figures(
        settings,
        PassTime(dense.seconds, dense.attention.attention_seconds),
        PassTime(sparse.seconds, sparse.attention.attention_seconds),
        layers,
        compare_clips(sparse.clip, dense.clip),
    )
    return Comparison(figures, dense.clip, sparse.clip, recorder.record())


def _summary(figures: Figures, page: Path) -> str:
    dense, sparse = figures.dense, figures.sparse
    return (
        f"in all     {dense.total_seconds:.1f} s -> {sparse.total_seconds:.1f} s, {figures.speedup:.2f}x as fast\n"
        f"attention  {dense.attention_seconds:.1f} s -> {sparse.attention_seconds:.1f} s, "
        f"{figures.attention_speedup:.2f}x as fast\n"
        f"likeness   PSNR {figures.quality.mean_psnr:.1f} dB, SSIM {figures.quality.mean_ssim:.3f}\n"
        f"open {page}"
    )


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def _versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("openvsa", "torch", "diffusers")}
    return found | {"python": platform.python_version()}
