"""What makes a clip twice and a page about both, whatever the model."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import openvsa
from openvsa.config import spinning_is_bounded
from openvsa.errors import OpenVSAError

if TYPE_CHECKING:
    from openvsa.evaluate import AttentionRecorder, Comparison, Figures, Settings
    from openvsa.integrations.config import SparsityConfig
    from openvsa.integrations.diffusers import SparseHandle
    from openvsa.integrations.report import SparsityReport

__all__ = [
    "PACKAGES",
    "available",
    "busy",
    "check_numbers",
    "check_output",
    "command",
    "describe",
    "make_pair",
    "shown_steps",
    "sparsity",
    "versions",
]

PACKAGES = ("diffusers", "av", "numpy", "PIL", "jinja2", "torchmetrics")
"""What making the page needs, beside the model."""


@dataclass(frozen=True)
class TimedClip:
    """A clip uint8 [frames, height, width, 3], and of a generation the wall seconds and what its attention did."""

    clip: Tensor
    seconds: float
    attention: SparsityReport


def make_pair(
    pipe: Any,
    make_clip: Callable[..., Tensor],
    settings: Settings,
    sparse_as: SparsityConfig,
    recorder_for: Callable[[SparsityReport], AttentionRecorder],
    out: Path,
    console: Console,
) -> Path:
    """Makes a clip with full and with sparse attention, and the page; returns its path.

    Weights with a compressed branch are another model without it: their clip with full attention is made over all tiles
    with the branch, and attention without it in one more generation, for times alone.

    Args:
        pipe: what `sparsify` takes.
        make_clip: takes num_inference_steps and callback_on_step_end, and returns uint8 [frames, height, width, 3].
        settings: how the clips are made, which is also what the page says.
        sparse_as: the settings of the sparse clip.
        recorder_for: gives the recorder of the sparse clip, knowing what the attention of the dense one was.
        out: a folder that can be written.
        console: where progress and figures are printed.

    Raises:
        OpenVSAError: the settings do not suit the model, or leave nothing sparse; found by a short generation.
    """
    from openvsa.evaluate import write_report
    from openvsa.evaluate.audit_config import dense_steps, uniform
    from openvsa.integrations.branch import pipeline_has_branch
    from openvsa.integrations.diffusers import observe, sparsify

    steps = settings.steps
    dense_in = dense_steps(sparse_as, steps)
    if len(dense_in) == steps:
        raise OpenVSAError(
            f"all {steps} steps stay dense ({'; '.join(sorted(set(dense_in.values())))}), so that there is nothing to "
            "compare; give more --steps, or other settings"
        )
    branch = pipeline_has_branch(pipe)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn once a step: a drawing thread would take its share of the processor from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:

        def bar(description: str, total: int) -> Callable[..., None]:
            if not console.is_terminal:
                console.print(f"{description} ...", highlight=False)
            task = progress.add_task(description, total=total)
            progress.refresh()
            return lambda *_: progress.update(task, advance=1, refresh=True)

        done = bar("warming up", 2)
        # Sparse first, so that settings that do not suit the model are refused before it works. Warmed up is what is
        # sparse: the first steps may be dense.
        warm = replace(sparse_as, steps={}, dense_first_steps=0, dense_last_steps=0)
        with sparsify(pipe, config=warm) as handle:
            _warm_up(make_clip, steps)
            _check_sparse(handle.report())
        done()
        with observe(pipe):
            _warm_up(make_clip, steps)
        done()
        with observe(pipe) as handle:
            dense = _timed(make_clip, handle, steps, bar("full attention", steps))
        if branch:
            with sparsify(pipe, config=uniform(sparse_as, 1.0), measure=False):
                on_step = bar("with all tiles", steps)
                dense = replace(dense, clip=make_clip(num_inference_steps=steps, callback_on_step_end=on_step))
        recorder = recorder_for(dense.attention)
        with sparsify(pipe, config=sparse_as) as handle:
            handle.on_attention(recorder)
            sparse = _timed(make_clip, handle, steps, bar("sparse attention", steps))
        done = bar("report", 1)
        comparison = _compare(settings, dense, sparse, recorder, branch)
        page = write_report(comparison, out)
        done()
    console.print(_summary(comparison.figures, page), markup=False, highlight=False, soft_wrap=True)
    if settings.device == describe(torch.device("cpu")) and (note := busy()):
        console.print(note, highlight=False, soft_wrap=True)
    return page


def _check_sparse(report: SparsityReport) -> None:
    """Refuse settings under which no layer was sparse."""
    if report.layers and not any(layer.sparse_calls for layer in report.layers):
        why = ", ".join(sorted({layer.why_dense for layer in report.layers}))
        raise OpenVSAError(f"every layer stays dense ({why}), so that there is nothing to compare; change the settings")


def sparsity(density: float | None, config: str | None, steps: int) -> SparsityConfig:
    """The settings of the sparse clip: a density, 1/4 by default, or else a file or a preset. Short sequences are made
    sparse as well, but for a file that has min_tokens.

    Raises:
        OpenVSAError: both are given, or there is no such file or preset, or it is wrong.
    """
    from openvsa.integrations.config import SparsityConfig
    from openvsa.integrations.presets import PRESETS

    if config is None:
        return SparsityConfig(density=0.25 if density is None else density, min_tokens=0)
    if density is not None:
        raise OpenVSAError("--config has a density of its own; leave out --density, or --config")
    if config in PRESETS:
        return SparsityConfig.preset(config, steps=steps, min_tokens=0)
    if not Path(config).is_file():
        raise OpenVSAError(f"--config {config} is no file, and no preset; presets are {', '.join(PRESETS)}")
    loaded = SparsityConfig.load(config)
    return replace(loaded, min_tokens=0) if loaded.min_tokens is None else loaded


def check_output(out: Path, config: str | None, image: Path | None) -> None:
    """Refuse a folder that cannot be written, and one in which a file of the report would replace what was given.

    Raises:
        OpenVSAError: it is so.
    """
    from openvsa.evaluate import check_output_folder
    from openvsa.evaluate.report import FILES

    if out.suffix == ".html":
        raise OpenVSAError(f"--out is a folder for the page and the videos, got {str(out)!r}; leave .html out")
    for option, given in (("--config", config), ("--image", image)):
        if given is not None and Path(given).resolve() in [(out / name).resolve() for name in FILES]:
            raise OpenVSAError(f"{option} {given} would be replaced by a file of the report; give another --out")
    check_output_folder(out)


def check_numbers(seed: int, steps: int) -> None:
    if steps < 1:
        raise OpenVSAError(f"--steps must be at least 1, got {steps}")
    if not 0 <= seed < 2**63:
        raise OpenVSAError(f"--seed must be at least 0 and below 2^63, got {seed}")


def shown_steps(steps: int) -> set[int]:
    """The denoising steps whose attention the page shows."""
    return {0, steps // 3, 2 * steps // 3, steps - 1}


def command(choice: list[str], options: dict[str, Any]) -> str:
    """The command line of a page: what was chosen, then the options that are set."""
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join(["openvsa", "generate", *choice, *words])


def available(name: str) -> torch.device:
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


def _warm_up(make_clip: Callable[..., Tensor], steps: int) -> None:
    """A short untimed generation, because the first use of every kernel and buffer is slower than the rest. It has two
    steps, as the schedule of Mochi cannot have one."""
    make_clip(num_inference_steps=min(2, steps))


def _timed(
    make_clip: Callable[..., Tensor], handle: SparseHandle, steps: int, on_step: Callable[..., None]
) -> TimedClip:
    begin = time.perf_counter()
    clip = make_clip(num_inference_steps=steps, callback_on_step_end=on_step)
    seconds = time.perf_counter() - begin
    return TimedClip(clip, seconds, handle.report())


def _compare(
    settings: Settings, dense: TimedClip, sparse: TimedClip, recorder: AttentionRecorder, branch: bool
) -> Comparison:
    from openvsa.evaluate import Comparison, Figures, LayerFigures, PassTime, compare_clips

    layers = tuple(
        LayerFigures(
            ours.layer, ours.name, ours.executed_density, full.attention_seconds, ours.attention_seconds, ours.why_dense
        )
        for full, ours in zip(dense.attention.layers, sparse.attention.layers, strict=True)
    )
    figures = Figures(
        settings,
        PassTime(dense.seconds, dense.attention.attention_seconds),
        PassTime(sparse.seconds, sparse.attention.attention_seconds),
        layers,
        compare_clips(sparse.clip, dense.clip),
        sparse.attention.delivered_density,
        branch,
    )
    return Comparison(figures, dense.clip, sparse.clip, recorder.record())


def _summary(figures: Figures, page: Path) -> str:
    dense, sparse = figures.dense, figures.sparse
    return (
        f"in all     {dense.total_seconds:.1f} s -> {sparse.total_seconds:.1f} s, {figures.speedup:.2f}x as fast\n"
        f"attention  {dense.attention_seconds:.1f} s -> {sparse.attention_seconds:.1f} s, "
        f"{figures.attention_speedup:.2f}x as fast\n"
        f"likeness   {figures.quality}{' (to all tiles, with the compressed branch)' if figures.branch else ''}\n"
        f"open {page}"
    )


def busy() -> str:
    """What to say where other programs have kept the processor busy, if the system tells; else "".

    Sparse attention on a CPU is many small steps that all threads take together, and OpenMP's threads spin while they
    wait for one that another program has pushed aside.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    if load < cores + 0.75 or torch.get_num_threads() == 1:
        return ""
    said = (
        f"Other programs kept the processor busy (load {load:.1f}, {cores} cores): sparse attention suffers from that "
        "more than full attention."
    )
    return said if spinning_is_bounded() else f"{said} It suffers less with GOMP_SPINCOUNT=3000 in the environment."


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("torch", "diffusers")}
    return {"openvsa": openvsa.__version__, **found, "python": platform.python_version()}
