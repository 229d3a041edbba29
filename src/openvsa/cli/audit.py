"""`openvsa audit`: what sparse attention keeps, loses and saves in a model, as a page and as numbers."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from openvsa.errors import OpenVSAError, require

if TYPE_CHECKING:
    from openvsa.evaluate.audit_figures import AuditFigures
    from openvsa.integrations.config import SparsityConfig

__all__ = ["run_audit"]

_PACKAGES = ("diffusers", "numpy", "PIL", "jinja2", "torchmetrics")


def run_audit(
    *,
    model: str | None,
    prompt: str | None,
    scene: str | None,
    image: Path | None,
    numbers: Mapping[str, Any],
    density: float | None,
    config: str | None,
    seed: int,
    steps: int,
    at: str | None,
    query_blocks: int,
    by: str,
    budget: Path | None,
    device: str,
    out: Path,
    console: Console | None = None,
) -> Path:
    """Audits a model and returns the path of the page. Every argument is checked before any work.

    Args:
        model: a folder that `openvsa train` made, or a Diffusers pipeline; None is the bundled model.
        prompt, numbers: for a Diffusers pipeline: the text, and `height`, `width`, `num_frames` and `guidance_scale`.
        scene: for the other two: the scene to continue.
        image: for all: a picture to continue. Not every pipeline takes one.
        density: the share of the tiles to keep, 1/8 by default.
        config: settings instead of it: a file or a preset's name.
        out: see `write_audit`. Neither it nor `budget` replaces a file that was given.

    Raises:
        OpenVSAError: an argument is wrong, a package is missing, or the model cannot be loaded.
    """
    for package in _PACKAGES:
        require(package, extra="demo")
    from openvsa.cli.generate import is_clip_model
    from openvsa.cli.generate_pair import available, busy, check_numbers, describe, sparsity, versions
    from openvsa.evaluate.audit import Audit
    from openvsa.evaluate.audit_config import check_table
    from openvsa.evaluate.audit_figures import AuditFigures, AuditSettings
    from openvsa.evaluate.audit_page import page_of, write_audit
    from openvsa.evaluate.files import atomic_path

    check_numbers(seed, steps)
    settled = sparsity(0.125 if density is None and config is None else density, config, steps)
    if query_blocks < 1:
        raise OpenVSAError(f"--query-blocks must be at least 1, got {query_blocks}")
    if by not in ("head", "layer"):
        raise OpenVSAError(f"--by must be head or layer, got {by!r}")
    audited = _audited(at, steps, settled)
    if budget is not None:
        check_table(settled)
    where = available(device)
    if model is None or is_clip_model(model):
        load_subject = _own(model, scene, prompt, image, numbers, seed, where)
    else:
        load_subject = _diffusers(model, scene, prompt, image, numbers, seed, where)
    _check_files(page_of(out), budget, {"--config": config, "--image": image})
    subject = load_subject()

    options = subject.options | {
        "--config": config, "--density": None if config else settled.density, "--seed": seed, "--steps": steps,
        "--at": ",".join(map(str, audited)), "--query-blocks": query_blocks, "--by": by, "--device": device,
        "--out": out, "--budget": budget,
    }  # fmt: skip
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    console = console or Console()
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn once a part: a drawing thread would take its share of the processor from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:

        def bar(description: str, total: int) -> Callable[[], None]:
            if not console.is_terminal:  # all bars would come at the end
                console.print(f"{description} ({total}) ...", highlight=False)
            task = progress.add_task(description, total=total)
            progress.refresh()
            return lambda: progress.update(task, advance=1, refresh=True)

        audit = Audit(
            subject.pipe, subject.make_clip, config=settled, steps=steps, audited=audited, query_blocks=query_blocks,
            by=by, on_progress=bar,
        )  # fmt: skip
        found = audit.run(with_table=budget is not None)
    layout = found.layout
    settings = AuditSettings(
        model="the bundled model" if model is None else _name_of(model),
        subject=subject.title,
        command=shlex.join(["openvsa", "audit", *([model] if model else []), *words]),
        seed=seed,
        steps=steps,
        density=settled.base.keep_ratio,
        grid=layout.grid,
        tile=layout.tile,
        num_tiles=layout.num_tiles,
        query_blocks=min(query_blocks, layout.num_blocks),
        device=describe(where),
        threads=torch.get_num_threads(),
        versions=versions(),
        config=settled,
        branch=found.branch,
    )
    figures = AuditFigures(
        settings, found.calls, found.forwards, found.dense, found.sparse, found.dense_forward, found.times,
        found.table, found.budgeted, found.dense_steps, found.dense_calls,
    )  # fmt: skip
    page = write_audit(figures, out, clip=found.sparse_clip, attention=found.attention)
    if budget is not None and found.table is not None:
        with atomic_path(budget) as temporary:
            found.table.save(temporary)
    console.print(_summary(figures, page, budget), markup=False, highlight=False, soft_wrap=True)
    if where.type == "cpu" and (note := busy()):
        console.print(note, highlight=False, soft_wrap=True)
    return page


def _check_files(page: Path, budget: Path | None, given: Mapping[str, str | Path | None]) -> None:
    """Refuses files that cannot be written, or that would replace each other or one that was `given` by an option."""
    from openvsa.evaluate import check_output_folder

    written = [page, page.with_suffix(".json")]
    if budget is not None:
        if budget.is_dir() or budget.resolve() in [path.resolve() for path in written]:
            raise OpenVSAError(f"--budget {budget} is a folder, or a file of the audit itself; name another file")
        written.append(budget)
    for option, file in given.items():
        for path in written:
            if file is not None and Path(file).is_file() and path.resolve() == Path(file).resolve():
                writer = "--budget" if path is budget else "--out"
                raise OpenVSAError(
                    f"the audit would write {path} over the file of {option} {file}; give {writer} another name"
                )
    for path in written:
        check_output_folder(path.parent)


def _name_of(model: str) -> str:
    """The name of a folder, also of one such as "."; or the id on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@dataclass(frozen=True)
class _Subject:
    """A model, and how it makes the clip that is audited. `options` of the command line choose the clip."""

    pipe: Any
    make_clip: Callable[..., Tensor]
    title: str
    options: dict[str, Any]


def _own(
    model: str | None,
    scene: str | None,
    prompt: str | None,
    image: Path | None,
    numbers: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Callable[[], _Subject]:
    """What loads the bundled model, or one that `openvsa train` made."""
    from openvsa.cli.generate import load_clip_model, start

    given = ["prompt"] if prompt is not None else [name for name, number in numbers.items() if number is not None]
    if given:
        raise OpenVSAError(
            f"{given[0]} is for Diffusers pipelines; this model continues a scene: give --scene or --image"
        )

    def load() -> _Subject:
        pipe = load_clip_model(model, device)
        title, (option, name), begin = start(pipe, scene, image)
        return _Subject(pipe, partial(pipe, **begin, seed=seed), title, {option: name})

    return load


def _diffusers(
    model: str,
    scene: str | None,
    prompt: str | None,
    image: Path | None,
    numbers: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Callable[[], _Subject]:
    """What loads any Diffusers pipeline that `openvsa generate --model` takes, if it tells of its steps."""
    from openvsa.cli.pipelines import arguments, call, clip_of, load, pipeline_class

    if scene is not None:
        raise OpenVSAError(
            "--scene is for the bundled model and those of openvsa train; a Diffusers pipeline takes --prompt"
        )
    kind = pipeline_class(model)
    asks = inspect.signature(kind.__call__).parameters
    if "callback_on_step_end" not in asks:
        raise OpenVSAError(f"{kind.__name__} takes no callback_on_step_end, from which an audit learns the steps")
    given = arguments(kind, asks, prompt, image, numbers)
    options = {"--prompt": prompt, "--image": image, "--height": numbers["height"], "--width": numbers["width"]}
    options |= {"--frames": numbers["num_frames"], "--guidance-scale": numbers["guidance_scale"]}

    def loaded() -> _Subject:
        pipe = load(kind, model, device)

        def make_clip(**keywords: Any) -> Tensor:
            # Drawn on the CPU, so that every device starts from the same noise.
            generator = torch.Generator().manual_seed(seed)
            return clip_of(call(pipe, **given, **keywords, output_type="np", generator=generator))

        return _Subject(pipe, make_clip, shorten(prompt or "", 90), options)

    return loaded


def _audited(at: str | None, steps: int, config: SparsityConfig) -> tuple[int, ...]:
    """The steps to look at: three, spread over those that are sparse, if none are named."""
    from openvsa.evaluate.audit_config import which_steps

    if at is None:
        return which_steps(config, steps)
    try:
        found = tuple(sorted({int(word) for word in at.split(",")}))
    except ValueError:
        raise OpenVSAError(f"--at takes steps with commas between, such as 1,4,6; got {at!r}") from None
    if not 0 <= found[0] <= found[-1] < steps:
        raise OpenVSAError(f"--at must name steps in 0..{steps - 1}, got {at}")
    return which_steps(config, steps, found)


def _summary(figures: AuditFigures, page: Path, budget: Path | None) -> str:
    sparse, dense = figures.sparse, figures.dense
    lines = [
        f"recall     {figures.recall:.1%} of attention on {figures.density:.1%} of the pairs; at best it would be "
        f"{figures.oracle_recall:.1%}",
        f"likeness   {sparse.quality}",
        f"in all     {dense.total_seconds:.1f} s -> {sparse.time.total_seconds:.1f} s, and no faster than "
        f"{figures.ceiling:.2f}x at any density",
    ]
    if figures.dense_steps or figures.dense_calls:
        steps, layers = len(figures.dense_steps), len(figures.dense_layers)
        lines.append(
            f"dense      {steps} of {figures.settings.steps} steps and {layers} of {len(figures.layers)} layers; with "
            f"them {sparse.density:.1%} of all pairs were computed"
        )
    if figures.budgeted is not None:
        ours = figures.budgeted
        lines.append(f"table      {ours.quality} at density {ours.density:.1%}, in {budget}")
        if not figures.table_is_better:
            lines.append(
                f"the table is no better than the uniform budget here: PSNR {sparse.quality.mean_psnr:.2f} -> "
                f"{ours.quality.mean_psnr:.2f} dB, change of the latents {sparse.latents_error:.2%} -> "
                f"{ours.latents_error:.2%}"
            )
    return "\n".join([*lines, f"open {page}"])
