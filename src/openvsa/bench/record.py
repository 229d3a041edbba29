"""Results as data: what was measured, where, with which versions. One JSON file a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import openvsa
from openvsa.errors import OpenVSAError

__all__ = ["MODEL_SCHEMA", "SCHEMA", "commit", "load", "new_record", "result_path", "write"]

SCHEMA = "openvsa-bench/1"
MODEL_SCHEMA = "openvsa-bench-models/1"
_PARTS = ("commit", "machine", "versions", "cases")
_DISTRIBUTIONS = (
    "triton", "numpy", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "fastvideo-kernel", "cuda-core",
    "cuda-bindings", "diffusers",
)  # fmt: skip


def new_record(
    device: torch.device, command: str, the_commit: str | None, settings: dict[str, Any], schema: str = SCHEMA
) -> dict[str, Any]:
    """A record with everything but results."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "schema": schema,
        "date": now.isoformat(timespec="seconds"),
        "command": command,
        "commit": the_commit,
        "machine": _machine(device),
        "versions": _versions(device),
        "settings": settings,
        "cases": [],
        "not_run": [],
    }


def commit() -> str | None:
    """`git describe` of the checkout that this package was imported from; None if it does not come from one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def result_path(folder: Path, record: dict[str, Any]) -> Path:
    """The file of a run, named by kind, machine and date; the folder is made and tried now, before there are results to
    lose.

    Raises:
        OpenVSAError: there cannot be such a folder, or no file in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OpenVSAError(
            f"no results can be written to the folder {str(folder)!r} ({error}); choose another"
        ) from None
    device = "".join(c if c.isalnum() else "-" for c in record["machine"]["device"].lower())
    stamp = datetime.datetime.fromisoformat(record["date"]).strftime("%Y%m%d-%H%M%S")
    kind = "models" if record["schema"] == MODEL_SCHEMA else "bench"
    return folder / f"{kind}-{device}-{stamp}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record so that the file is never half of one.

    Raises:
        OpenVSAError: it cannot be written, to a full disk for one.
    """
    partial, text = path.with_suffix(".part"), json.dumps(record, indent=1) + "\n"
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise OpenVSAError(f"the results cannot be written to {str(path)!r} ({error}); choose another folder") from None


def load(path: Path, *schemas: str) -> dict[str, Any]:
    """Read a result file, of kernels unless other `schemas` are named.

    Raises:
        OpenVSAError: it is missing, no JSON, of another schema, or lacks a part or a time.
    """
    schemas = schemas or (SCHEMA,)
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OpenVSAError(f"{str(path)!r} cannot be read as a result file ({error})") from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found not in schemas:
        wanted = " or ".join(map(repr, schemas))
        raise OpenVSAError(f"{str(path)!r} has the schema {found!r}, but {wanted} is needed; measure again")
    lacking = [part for part in _PARTS if part not in record]
    if lacking:
        raise OpenVSAError(f"{str(path)!r} is no whole result file, it lacks {', '.join(lacking)}; measure again")
    try:
        times = [row["ms"] for case in record["cases"] if case["name"] and "passed" in case for row in case["rows"]]
        whole = bool(record["machine"]["device"]) and all(time > 0 for time in times)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise OpenVSAError(
            f"{str(path)!r} is no whole result file: a machine, case, row or time is missing; measure again"
        )
    return record


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "device": f"CPU {platform.machine()} {torch.get_num_threads()} threads",
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "driver": None,
        }
    gpu = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", f"--id=GPU-{gpu.uuid}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "device": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "driver": driver,
    }


def _processor() -> str | None:
    """The model of the CPU; two of one architecture may differ in speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or None


def _versions(device: torch.device) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "openvsa": openvsa.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": str(torch.backends.cudnn.version()) if device.type == "cuda" else None,
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
