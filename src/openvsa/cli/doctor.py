"""What can run on this machine, and what cannot and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from openvsa.ops.capability import Backend, Problem
from openvsa.ops.registry import backends

__all__ = ["EXTRAS", "examine"]

# The distributions behind each extra that a user chooses from.
EXTRAS = {
    "cli": ("typer", "rich"),
    "diffusers": ("diffusers", "transformers", "accelerate", "safetensors"),
    "io": ("safetensors",),
    "triton": ("triton",),
    "video": ("av", "jinja2", "numpy", "pillow", "torchmetrics"),
}


def examine(console: Console) -> None:
    """Print versions, extras, and per backend whether it can run here with every reason why not."""
    console.print(_versions(), _extras(), *(_backends(device_type) for device_type in _device_types()))


def typical_problem(device_type: str, *, training: bool) -> Problem:
    """Self-attention as video models have it, over equal blocks of 64 tokens: what a backend should manage at least."""
    return Problem(
        device_type=device_type,
        dtype=torch.float32 if device_type == "cpu" else torch.bfloat16,
        head_dim=64,
        head_dim_v=64,
        num_heads=8,
        num_kv_heads=8,
        max_q_block=64,
        max_kv_block=64,
        uniform=True,
        needs_grad=training,
    )


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Table:
    table = Table("", "", title="machine", show_header=False)
    table.add_row("openvsa", _installed("openvsa") or "not installed as a package")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    table.add_row(
        "torch", f"{torch.__version__}, {built_for if torch.version.cuda or torch.version.hip else 'CPU only'}"
    )
    table.add_row("triton", _installed("triton") or "not installed")
    table.add_row("processor", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}")
    if not torch.cuda.is_available():
        table.add_row("gpu", "none that torch can use")
    return table


def _extras() -> Table:
    table = Table("extra", "installed", "missing", title="extras")
    for extra, distributions in EXTRAS.items():
        found = {name: _installed(name) for name in distributions}
        missing = [name for name, version in found.items() if version is None]
        table.add_row(
            extra,
            ", ".join(f"{name} {version}" for name, version in found.items() if version),
            f"{', '.join(missing)}: pip install 'openvsa\\[{extra}]'" if missing else "",
        )
    return table


def _backends(device_type: str) -> Table:
    table = Table(
        "backend", "inference", "training", "why not", title=f"backends on {device_type}, in the order of auto"
    )
    for backend in backends():
        table.add_row(backend.name, *_answers(backend, device_type))
    return table


def _answers(backend: Backend, device_type: str) -> tuple[str, str, str]:
    inference = backend.unsupported_reasons(typical_problem(device_type, training=False))
    training = backend.unsupported_reasons(typical_problem(device_type, training=True))
    reasons = [*inference, *(f"training: {reason}" for reason in training if reason not in inference)]
    return "no" if inference else "yes", "no" if training else "yes", "\n".join(reasons)
