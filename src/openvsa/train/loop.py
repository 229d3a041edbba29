"""The training loop."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor

import openvsa
from openvsa.errors import OpenVSAError, require
from openvsa.models.bundled import load_pipeline, save_pipeline
from openvsa.models.pipeline import ClipPipeline
from openvsa.models.scenes import Scene, bundled_scenes
from openvsa.models.shots import UNKNOWN_SHOT
from openvsa.models.tokenizer import PatchTokenizer
from openvsa.train.clips import Clips
from openvsa.train.evaluation import evaluate
from openvsa.train.film import fetch_film, read_film
from openvsa.train.flow import draw_levels, flow_error
from openvsa.train.recipe import TrainConfig
from openvsa.train.samples import write_sheet
from openvsa.train.state import TrainState

__all__ = ["TrainResult", "run"]

_FILM_FPS = 24
_TOKENIZER_CLIPS = 256


@dataclass(frozen=True)
class TrainResult:
    """What a run made. `curve` holds the lines of curve.jsonl that this call wrote.

    `first` and `last` are the evaluation losses before and after, by set of clips and density. `finished` is False when
    the run was paused; no model is written then.
    """

    steps: int
    seconds: float
    finished: bool
    first: dict[str, dict[str, float]]
    last: dict[str, dict[str, float]]
    curve: tuple[dict[str, Any], ...]
    out: Path


def run(config: TrainConfig) -> TrainResult:
    """Trains as `config` says, and writes the model, its loss curve and a sheet of samples into `config.out`.

    Raises `OpenVSAError` when the film or the checkpoint cannot be read, something cannot be written, the device is not
    there, or the loss stops being a number.
    """
    _check_surroundings(config)
    frames = read_film(config.film or fetch_film(config.cache), config.frame_size, config.shots.end)
    scenes = _usable_scenes(config)
    clips = Clips(
        frames.to(config.device),
        config.shots,
        num_frames=config.num_frames,
        stride=config.stride,
        scene_starts=[scene.start for scene in scenes if not scene.held_out],
        scene_share=config.scene_share,
    )
    tokenizer: Any = PatchTokenizer.fit(_tokenizer_clips(clips), num_components=config.num_components)
    tokenizer.to(config.device)
    state = TrainState(config)
    if config.resume and config.checkpoint is not None:
        state.load(config.checkpoint, config.seed)
    try:
        curve = _train(config, state, clips, tokenizer)
    except OSError as error:  # a full disk, say
        raise OpenVSAError(f"cannot go on after {state.step} steps: {error}; see to the folder {config.out}") from None
    evaluations = [line for line in curve if "held_out" in line]
    finished = config.progress(state.step, state.seconds) >= 1
    result = TrainResult(
        steps=state.step,
        seconds=state.seconds,
        finished=finished,
        first={name: evaluations[0][name] for name in ("training", "held_out")},
        last={name: evaluations[-1][name] for name in ("training", "held_out")},
        curve=tuple(curve),
        out=config.out,
    )
    if finished:
        try:
            _export(config, state, tokenizer, clips, scenes, result)
        except (OSError, SafetensorError) as error:
            again = ", and run the command again with --resume" if config.checkpoint is not None else ""
            raise OpenVSAError(
                f"trained, but the model cannot be written into {config.out}: {error}; make room there{again}"
            ) from None
    return result


def _check_surroundings(config: TrainConfig) -> None:
    """Refuse at once what would otherwise end the run once the film is read or, worse, at its first checkpoint."""
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OpenVSAError(f"the device must be cpu, cuda or cuda:N, got {config.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OpenVSAError(
            f"the device {config.device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    checkpoint = config.checkpoint
    for folder in (config.out, *(() if checkpoint is None else (checkpoint.parent,))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OpenVSAError(f"cannot write into the folder {str(folder)!r}: {error}; choose another") from None
    if checkpoint is not None and checkpoint.is_dir():
        raise OpenVSAError(f"the checkpoint must be a file, and {str(checkpoint)!r} is a folder; name a file in it")
    if not config.resume and checkpoint is not None and checkpoint.exists():
        raise OpenVSAError(
            f"the checkpoint {str(checkpoint)!r} exists already, and a new run would overwrite it: go on from it with "
            "--resume, name another file, or remove it"
        )
    if config.resume and checkpoint is not None and not checkpoint.is_file():
        raise OpenVSAError(f"there is no checkpoint {str(checkpoint)!r} to resume; leave out --resume to begin one")


def _train(config: TrainConfig, state: TrainState, clips: Clips, tokenizer: PatchTokenizer) -> list[dict[str, Any]]:
    rich_progress = require("rich.progress", extra="train")
    transformer: Any = state.worker["transformer"]
    # An evaluation is at the densities that it names, whether or not they pay.
    handle = openvsa.sparsify(transformer, density=1.0, measure=False, min_tokens=0)
    if config.compile:
        transformer.compile_repeated_blocks(dynamic=False)
    curve: list[dict[str, Any]] = []
    total, logged = torch.zeros((), device=config.device), state.step
    begun, before = time.monotonic(), state.seconds
    path = config.out / "curve.jsonl"
    path.write_text("".join(_lines_until(state.step, path)) if config.resume else "")
    with (
        path.open("a") as file,
        rich_progress.Progress() as bar,
    ):
        task = bar.add_task("training", total=config.pause_at)

        def record(line: dict[str, Any]) -> None:
            line = {"step": state.step, "minutes": round(state.seconds / 60, 3), **line}
            curve.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.console.print_json(json.dumps(line), indent=None)

        def assess() -> None:
            # Compiled blocks are specialised to training; an evaluation is too short to compile for.
            with torch.compiler.set_stance("force_eager"):
                record(evaluate(config, state.lend(state.ema.module), handle, tokenizer, clips))

        assess()
        assessed = state.step
        while (done := config.progress(state.step, state.seconds)) < config.pause_at:
            factor = config.lr_factor(state.step, done)
            state.set_lr(factor)
            total += _step(config, state, clips, tokenizer, handle)
            state.seconds = before + time.monotonic() - begun
            if state.step % config.log_every == 0:
                loss = total.item() / (state.step - logged)
                if loss != loss:
                    raise OpenVSAError(f"the loss is not a number after {state.step} steps; lower the learning rates")
                record({"loss": loss, "lr_factor": factor})
                total, logged = torch.zeros_like(total), state.step
                bar.update(task, completed=done)
            if state.step % config.evaluate_every == 0:
                assess()
                assessed = state.step
                if config.checkpoint is not None:
                    state.save(config.checkpoint)
        bar.update(task, completed=min(done, config.pause_at))
        if assessed < state.step:
            assess()
        if config.checkpoint is not None:
            state.save(config.checkpoint)
    handle.detach()
    return curve


def _lines_until(step: int, path: Path) -> Iterator[str]:
    """The lines of a loss curve up to a step: a run that was killed wrote more after its last checkpoint, the last one
    perhaps in part."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except (ValueError, KeyError, TypeError):
            continue


def _step(config: TrainConfig, state: TrainState, clips: Clips, tokenizer: PatchTokenizer, handle: Any) -> Tensor:
    """One optimizer step; the loss, still on the device."""
    draws, device = state.draws, config.device
    density = config.densities[int(torch.randint(len(config.densities), (), generator=draws))]
    starts = clips.draw(config.batch_size, draws)
    told = torch.rand(len(starts), generator=draws) >= config.drop_shot
    rows = torch.where(told, torch.tensor(clips.rows(starts)), UNKNOWN_SHOT)
    levels = draw_levels(len(starts), draws, spread=config.noise_spread, shift=config.noise_shift)

    batch = clips.load(starts)
    noise = torch.randn(tokenizer.latent_shape(batch.shape), generator=state.noise, device=device)
    handle.density = density
    rows, levels = rows.to(device, non_blocking=True), levels.to(device, non_blocking=True)
    loss = flow_error(state.lend(state.model), tokenizer, batch, rows, levels, noise).mean()
    loss.backward()
    state.update(config.clip_norm)
    return loss.detach()


def _tokenizer_clips(clips: Clips) -> Iterator[Tensor]:
    """Training clips at even distances over the film, a few at a time."""
    every = max(1, len(clips.training) // _TOKENIZER_CLIPS)
    chosen = clips.training[::every]
    for first in range(0, len(chosen), 8):
        yield clips.load(chosen[first : first + 8])


def _usable_scenes(config: TrainConfig) -> list[Scene]:
    """The scenes that lie in the part of the film that the run uses, on the same side of the split."""
    return [
        scene
        for scene in bundled_scenes()
        if scene.start < config.shots.end and config.shots.row(scene.shot) == scene.row
    ]


def _export(
    config: TrainConfig,
    state: TrainState,
    tokenizer: PatchTokenizer,
    clips: Clips,
    scenes: list[Scene],
    result: TrainResult,
) -> None:
    model: Any = state.ema.module.eval()
    pipe = ClipPipeline(
        transformer=model["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.noise_shift),
        tokenizer=tokenizer,
        shot_tokens=model["shot_tokens"],
        scenes=scenes,
        frame_size=config.frame_size,
        fps=_FILM_FPS / config.stride,
    )
    facts = {
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
        "device": torch.cuda.get_device_name(config.device) if state.dtype == torch.bfloat16 else config.device,
        "torch": torch.__version__,
        "evaluation": result.last,
        "recipe": {
            **{name: value for name, value in asdict(config).items() if not isinstance(value, (Path, dict))},
            "seed": state.seed,
        },
    }
    save_pipeline(pipe, config.out / "model", facts)
    pipe = load_pipeline(config.out / "model", config.device, state.dtype)
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[str, Tensor]] = []
    for scene in scenes:
        film = clips.load([scene.start])[0].permute(1, 2, 3, 0)
        rows.append((f"{scene.name}: film{', held out' if scene.held_out else ''}", ((film + 1) * 127.5).byte().cpu()))
        for density in (1.0, 0.25):
            handle = openvsa.sparsify(pipe, density=density, min_tokens=0)
            clip = pipe(scene=scene.name, num_inference_steps=config.sample_steps)
            handle.detach()
            rows.append((f"{scene.name}: density {density}", clip))
    if rows:
        write_sheet(rows, config.out / "samples.png")
