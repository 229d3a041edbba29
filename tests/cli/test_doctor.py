"""`openvsa doctor` tells the truth about this machine, and all of it."""

from __future__ import annotations

import io
from importlib import metadata

import pytest
import torch
from rich.console import Console

from openvsa.cli.doctor import examine, typical_problem
from openvsa.ops.registry import backends


def examined() -> str:
    """Everything doctor prints, on a console wide enough that no line is broken."""
    text = io.StringIO()
    examine(Console(file=text, width=500))
    return text.getvalue()


def rows_of(report: str, first_cell: str) -> list[str]:
    """The row that begins with a cell, and the lines that continue it."""
    lines = iter(report.splitlines())
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 2 and (cells[1] == first_cell or (found and not cells[1])):
            found.append(line)
        elif found:
            break
    return found


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_each_backend_is_listed_with_every_reason(backend) -> None:
    rows = "\n".join(rows_of(examined().split("backends on cpu")[1], backend.name))
    for training in (False, True):
        reasons = backend.unsupported_reasons(typical_problem("cpu", training=training))
        assert all(reason in rows for reason in reasons)
    cells = [cell.strip() for cell in rows.splitlines()[0].split("│")]
    can_run = not backend.unsupported_reasons(typical_problem("cpu", training=False))
    assert cells[2] == ("yes" if can_run else "no")


def test_versions_are_shown() -> None:
    assert torch.__version__ in examined()


def test_a_missing_extra_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_av(distribution: str) -> str:
        if distribution == "av":
            raise metadata.PackageNotFoundError
        return version(distribution)

    monkeypatch.setattr(metadata, "version", without_av)
    (row,) = rows_of(examined(), "video")
    assert "av: pip install 'openvsa[video]'" in row
    assert f"pillow {version('pillow')}" in row
