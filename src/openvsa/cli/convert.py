"""Checkpoints from one layout to the other, and what was done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openvsa.integrations.checkpoint import convert

__all__ = ["run_convert"]


def run_convert(source: Path, target: Path, to: Any, branch: Any) -> None:
    """See `openvsa.integrations.checkpoint.convert`, which also checks the names given for `to` and `branch`."""
    done = convert(source, target, to, branch=branch, on_file=_say_file)
    print(f"wrote {target}: {done.tensors} tensors, {done.renamed} under a new name")
    if done.added:
        print(f"added zero branch weights to {done.added} blocks: the model computes what it did")
    if done.dropped:
        print(f"dropped the branch weights of {done.dropped} blocks: dense now, and another model if they were trained")
    if not done.branch:
        print("the result has no branch weights")


def _say_file(name: str, number: int, files: int) -> None:
    print(f"converting {name} ({number} of {files})", flush=True)
