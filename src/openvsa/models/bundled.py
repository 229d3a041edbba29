"""Reading and writing the files of a clip model: safetensors and JSON, with a manifest of checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn

from openvsa.errors import OpenVSAError
from openvsa.models.pipeline import ClipPipeline
from openvsa.models.scenes import bundled_scenes
from openvsa.models.shots import ShotTokens
from openvsa.models.tokenizer import PatchTokenizer

__all__ = ["WEIGHTS_FOLDER", "load_bundled", "load_pipeline", "save_pipeline"]

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
_MANIFEST = "manifest.json"


def load_bundled(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ClipPipeline:
    """The model that ships with the package, with its scenes.

    Args:
        dtype: of the transformer. The tokenizer is always fp32.

    Raises:
        OpenVSAError: the weights are missing or damaged.
    """
    return load_pipeline(WEIGHTS_FOLDER, device, dtype)


def load_pipeline(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ClipPipeline:
    """A model saved by `save_pipeline`, with those of the package's scenes that its table of shots reaches: one
    that was trained on the first shots of the film was never told the others. Raises as `load_bundled`."""
    facts = _verified_manifest(folder)
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")}
    for name, (kind, runs_in) in {
        "transformer": (WanTransformer3DModel, dtype),
        "tokenizer": (PatchTokenizer, torch.float32),
        "shot_tokens": (ShotTokens, torch.float32),
    }.items():
        part = kind.from_pretrained(folder / name, dtype=runs_in)
        parts[name] = part.to(device).eval().requires_grad_(False)
    scenes = [scene for scene in bundled_scenes() if scene.row < parts["shot_tokens"].table.shape[0]]
    return ClipPipeline(**parts, scenes=scenes, frame_size=tuple(facts["frame_size"]), fps=float(facts["fps"]))


def save_pipeline(pipe: ClipPipeline, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the model, its transformer and shot tokens in bf16, and a manifest with `facts` about its making."""
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("transformer", "shot_tokens"):
        _bf16_copy(getattr(pipe, name)).save_pretrained(folder / name)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    manifest = {
        "frame_size": list(pipe.frame_size),
        "fps": pipe.fps,
        "sha256": {path.relative_to(folder).as_posix(): _sha256(path) for path in files},
        "facts": dict(facts),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _bf16_copy(part: Any) -> Any:
    copy = type(part).from_config(part.config)
    copy.load_state_dict(part.state_dict())
    # Diffusers' own `to` would warn that some of these weights are best run in fp32, which is for the reader to do.
    nn.Module.to(copy, torch.bfloat16)
    return copy


def _verified_manifest(folder: Path) -> dict[str, Any]:
    advice = "Copy it again from where it was trained."
    if folder == WEIGHTS_FOLDER:
        advice = "Install the package again; from a checkout, `git status` shows what was changed."
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        expected = manifest["sha256"]
    except FileNotFoundError:
        raise OpenVSAError(f"there is no model in {str(folder)!r}: {_MANIFEST} is missing. {advice}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenVSAError(f"{str(folder / _MANIFEST)!r} cannot be read ({error!r}). {advice}") from None
    for name, checksum in expected.items():
        path = folder / name
        if not path.is_file():
            raise OpenVSAError(f"the model file {str(path)!r} is missing. {advice}")
        if _sha256(path) != checksum:
            raise OpenVSAError(
                f"the model file {str(path)!r} is damaged: its {path.stat().st_size} bytes do not have the "
                f"checksum in {_MANIFEST}. {advice}"
            )
    return manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
