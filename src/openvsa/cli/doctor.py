"""What can run on this machine, and what cannot and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openvsa.errors import ShapeError, UnsupportedError
from openvsa.ops.capability import Backend, Problem, capability_of
from openvsa.ops.registry import backends, choose

__all__ = ["EXTRAS", "Question", "examine"]

# The distributions behind each extra that a user chooses from.
EXTRAS = {
    "cli": ("typer", "rich"),
    "diffusers": (
        "diffusers",
        "transformers",
        "accelerate",
        "safetensors",
        "pyyaml",
        "ftfy",
        "sentencepiece",
        "protobuf",
    ),
    "fa4": ("flash-attn-4",),
    "hopper": ("cuda-core",),
    "io": ("numpy", "safetensors"),
    "triton": ("triton",),
    "video": ("av", "jinja2", "numpy", "pillow", "torchmetrics"),
}


@dataclass(frozen=True)
class Question:
    """The problem that backends are asked about: attention over `tokens` tokens with `heads` heads.

    Args:
        block: tokens of query and key blocks: "64", or "128x64" for query blocks of 128 over key blocks of 64.
        ragged: whether blocks differ in length, as where the tile does not divide the lattice.
        dtype: by default bfloat16 on a GPU and float32 on the CPU.
        head_dim_v, kv_tokens, kv_heads: of values and keys; None means as of queries.
        deterministic: as after torch.use_deterministic_algorithms(True).

    Raises:
        ShapeError: `block` or `dtype` is not of these forms, or `heads` is no multiple of `kv_heads`.
    """

    head_dim: int = 128
    block: str = "64"
    ragged: bool = False
    dtype: str | None = None
    tokens: int = 32768
    heads: int = 12
    head_dim_v: int | None = None
    kv_tokens: int | None = None
    kv_heads: int | None = None
    batch: int = 1
    deterministic: bool = False

    def problem(self, device: torch.device, *, training: bool) -> Problem:
        """As the registry sees it, for tensors on `device`."""
        sizes = self.block.split("x")
        if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ShapeError(f"block must be a number of tokens such as 64, or two such as 128x64, got {self.block!r}")
        dtype = getattr(torch, self.dtype or ("float32" if device.type == "cpu" else "bfloat16"), None)
        if not isinstance(dtype, torch.dtype):
            raise ShapeError(f"dtype must be the name of a torch dtype such as bfloat16, got {self.dtype!r}")
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ShapeError(f"heads must be a multiple of kv_heads, got {self.heads} and {kv_heads}")
        return Problem(
            device_type=device.type,
            capability=capability_of(device),
            dtype=dtype,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v or self.head_dim,
            batch=self.batch,
            num_heads=self.heads,
            num_kv_heads=kv_heads,
            q_tokens=self.tokens,
            kv_tokens=self.kv_tokens or self.tokens,
            max_q_block=int(sizes[0]),
            max_kv_block=int(sizes[-1]),
            uniform=not self.ragged,
            needs_grad=training,
            deterministic=self.deterministic,
        )


def examine(console: Console, question: Question) -> None:
    """Print versions, extras, and per backend whether it can run `question` here with every reason why not."""
    tables = [_backends(device, question) for device in _devices()]
    console.print(_versions(), _extras(), *tables)


def _devices() -> list[torch.device]:
    """The CPU, and the first GPU of every kind: what can run does not differ between equal ones."""
    gpus = [
        torch.device("cuda", index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    first = {torch.cuda.get_device_capability(gpu): gpu for gpu in reversed(gpus)}
    return [torch.device("cpu"), *sorted(first.values(), key=lambda gpu: gpu.index)]


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


def _backends(device: torch.device, question: Question) -> Table:
    inference, training = (question.problem(device, training=grad) for grad in (False, True))
    title = f"backends on {device}, in the order of auto\n{_form(question, inference)}"
    table = Table("backend", "inference", "training", "why not", title=title)
    for backend in backends():
        reasons, when_training = _reasons(backend, inference), _reasons(backend, training)
        why = [*reasons, *(f"training: {reason}" for reason in when_training if reason not in reasons)]
        table.add_row(backend.name, *(_answer(backend, p) for p in (inference, training)), escape("\n".join(why)))
    table.add_section()
    table.add_row("auto", _taken(inference), _taken(training), "")
    return table


def _form(question: Question, problem: Problem) -> str:
    """The problem in words; numbers of k and v where they were given."""
    parts = [
        f"blocks of {question.block}{' and fewer' if question.ragged else ''} tokens",
        f"head_dim {problem.head_dim}" + (f" ({problem.head_dim_v} of v)" if question.head_dim_v else ""),
        str(problem.dtype).removeprefix("torch."),
        f"{problem.q_tokens:,} tokens" + (f" ({problem.kv_tokens:,} of k and v)" if question.kv_tokens else ""),
        f"{problem.num_heads} heads" + (f" ({problem.num_kv_heads} of k and v)" if question.kv_heads else ""),
        f"batch {problem.batch:,}" if problem.batch != 1 else "",
        "deterministic" if problem.deterministic else "",
    ]
    return ", ".join(part for part in parts if part)


def _reasons(backend: Backend, problem: Problem) -> list[str]:
    return backend.unsupported_reasons(problem) or backend.auto_reasons(problem)


def _answer(backend: Backend, problem: Problem) -> str:
    if backend.unsupported_reasons(problem):
        return "no"
    return "by name" if backend.auto_reasons(problem) else "yes"


def _taken(problem: Problem) -> str:
    try:
        return f"takes {choose(problem).name}"
    except UnsupportedError:
        return "raises"
