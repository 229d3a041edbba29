"""Result files: whole or absent, of a known schema, with the commit they were measured at."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from openvsa import OpenVSAError
from openvsa.bench import record
from openvsa.bench.record import load, new_record, result_path, write

CPU = torch.device("cpu")


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    made = new_record(CPU, "openvsa bench", "abc", {"seconds": 3})
    path = result_path(tmp_path / "deep", made)
    write(path, made)
    assert load(path) == json.loads(json.dumps(made))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.name.startswith("bench-cpu-")


def test_a_failed_write_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    made = new_record(CPU, "openvsa bench", "abc", {})
    write(path, made)
    with pytest.raises(TypeError):
        write(path, {**made, "bad": object()})
    assert load(path) == made


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "schema None"),
        ('{"schema": "openvsa-bench/0"}', "'openvsa-bench/1' is needed"),
        ('{"schema": "openvsa-bench/1", "cases": []}', "lacks commit, machine, versions; measure again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(OpenVSAError, match=match):
        load(path)
    with pytest.raises(OpenVSAError, match="cannot be read"):
        load(tmp_path / "absent.json")


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "results"
    file.touch()
    with pytest.raises(OpenVSAError, match=r"no results can be written to the folder '.*results' .*; choose another"):
        result_path(file, new_record(CPU, "openvsa bench", None, {}))


def test_a_folder_that_takes_no_file_is_refused_too() -> None:
    # Not even root can make a file there.
    with pytest.raises(OpenVSAError, match=r"no results can be written to the folder '/proc' .*; choose another"):
        result_path(Path("/proc"), new_record(CPU, "openvsa bench", None, {}))


def test_a_disk_that_fills_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(OpenVSAError, match=r"cannot be written to '.*bench.json' \(.*No space left on device\)"):
        write(tmp_path / "bench.json", new_record(CPU, "openvsa bench", None, {}))


@pytest.mark.parametrize(
    "change",
    [{"machine": {}}, {"cases": [{"name": "a", "passed": True}]}, {"cases": 3}, {"cases": [{"rows": []}]},
     *({"cases": [{"name": "a", "passed": True, "rows": [row]}]} for row in ({}, {"ms": 0}, {"ms": float("nan")}))],
)  # fmt: skip
def test_damaged_files_are_refused(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, new_record(CPU, "openvsa bench", None, {}) | change)
    with pytest.raises(OpenVSAError, match="is no whole result file: a machine, case, row or time is missing"):
        load(path)


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Path(record.__file__).parent
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    found = record.commit()
    if head.returncode:
        assert found is None
    else:
        assert found is not None
        assert head.stdout.startswith(found.removesuffix("-dirty").split("-g")[-1])
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.commit() is None


def test_results_in_the_repository_can_be_read() -> None:
    files = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("bench-*.json"))
    assert files
    assert all(load(file)["cases"] for file in files)
