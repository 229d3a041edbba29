"""`openvsa doctor` tells the truth about this machine, and all of it."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from openvsa import BlockPlan, ShapeError
from openvsa.cli.doctor import Question, examine
from openvsa.ops import registry
from openvsa.ops.capability import Backend, Problem
from openvsa.ops.registry import backends, choose

CPU = torch.device("cpu")
QUESTION = Question()
QUESTIONS = (
    QUESTION,
    Question(ragged=True),
    Question(block="128x64"),
    Question(head_dim=80, block="128", dtype="float16"),
    Question(block="200", tokens=1000, heads=2, head_dim=512, dtype="float64"),
    Question(block="128", heads=8, kv_heads=2, batch=70000, kv_tokens=77, head_dim_v=64, deterministic=True),
)


def examined(question: Question = QUESTION) -> str:
    """Everything doctor prints, on a console wide enough that no line is broken."""
    text = io.StringIO()
    examine(Console(file=text, width=500), question)
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


def cells_of(report: str, first_cell: str) -> list[str]:
    return [cell.strip() for cell in rows_of(report, first_cell)[0].split("│")]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_each_backend_is_listed_with_every_reason(backend: Backend, question: Question) -> None:
    report = examined(question).split("backends on cpu")[1]
    rows = "\n".join(rows_of(report, backend.name))
    for at, training in ((2, False), (3, True)):
        problem = question.problem(CPU, training=training)
        reasons, left_out = backend.unsupported_reasons(problem), backend.auto_reasons(problem)
        assert all(reason in rows for reason in reasons or left_out)
        assert cells_of(report, backend.name)[at] == ("no" if reasons else "by name" if left_out else "yes")


def test_it_says_which_one_auto_takes() -> None:
    problem = QUESTION.problem(CPU, training=False)
    assert cells_of(examined(), "auto")[2:4] == [f"takes {choose(problem).name}"] * 2


def test_a_question_is_the_problem_of_a_call() -> None:
    """Of one with grouped heads, other keys than queries, a batch, and torch's deterministic mode."""
    q, k, v = torch.empty(3, 40, 8, 32), torch.empty(3, 24, 2, 32), torch.empty(3, 24, 2, 16)
    plan = BlockPlan.dense([0, 10, 20, 30, 40], [0, 8, 16, 24])
    torch.use_deterministic_algorithms(True)
    try:
        problem = Problem.of(q, k, v, plan)
    finally:
        torch.use_deterministic_algorithms(False)
    question = Question(32, "10x8", False, "float32", 40, 8, 16, 24, 2, 3, True)
    assert question.problem(CPU, training=False) == problem


def test_what_is_asked_is_said_and_counts() -> None:
    report = examined(Question(heads=8, kv_heads=2, batch=70000, kv_tokens=77, head_dim_v=64, deterministic=True))
    report = report.split("backends on cpu")[1]
    form = "head_dim 128 (64 of v), float32, 32,768 tokens (77 of k and v), 8 heads (2 of k and v), batch 70,000, "
    assert form + "deterministic" in report
    assert "needs v to have the head_dim of q, 128, not 64" in "".join(rows_of(report, "triton"))
    assert "takes a batch of at most 65535, not 70000" in "".join(rows_of(report, "triton"))
    assert "training: its gradients differ in the last bits" in "".join(rows_of(report, "fa4"))


def test_every_kind_of_gpu_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two H100 and a V100 between them: each kind once, by its own capability."""
    capabilities = [(9, 0), (7, 0), (9, 0)]

    def properties(index: int) -> SimpleNamespace:
        major, minor = capabilities[index]
        return SimpleNamespace(name=f"gpu {index}", total_memory=2**34, major=major, minor=minor)

    monkeypatch.setattr(registry, "_installed_version", lambda name: "99")
    monkeypatch.setattr(registry, "_nvrtc_and_driver", lambda: (13, 13000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    report = examined()
    assert report.count("backends on") == 3
    _, first, second = report.split("backends on ")[1:]
    assert first.startswith("cuda:0")
    assert cells_of(first, "hopper")[2] == "yes"
    assert second.startswith("cuda:1")
    assert "compute capability 9.0 (H100, H200), not (7, 0)" in "".join(rows_of(second, "hopper"))
    assert "compute capability 8.0 or newer, not (7, 0)" in "".join(rows_of(second, "triton"))


def test_a_backend_that_auto_leaves_out_can_be_had_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", tuple(b for b in backends() if b.name == "reference"))
    report = examined()
    assert cells_of(report, "reference")[2:4] == ["by name", "by name"]
    assert "its dense scores would take 48.0 GiB, more than 2 GiB" in report
    assert cells_of(report, "auto")[2:4] == ["raises", "raises"]
    assert cells_of(examined(replace(QUESTION, tokens=4096)), "auto")[2] == "takes reference"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": "64x64x64"}, "block must be a number of tokens such as 64, or two such as 128x64, got '64x64x64'"),
        ({"block": "0"}, "got '0'"),
        ({"block": "big"}, "got 'big'"),
        ({"dtype": "bf16"}, "dtype must be the name of a torch dtype such as bfloat16, got 'bf16'"),
        ({"dtype": "zeros"}, "got 'zeros'"),
        ({"kv_heads": 5}, "heads must be a multiple of kv_heads, got 12 and 5"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        examined(replace(QUESTION, **wrong))


def test_a_remedy_in_a_reason_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its brackets are none of Rich's marks."""
    monkeypatch.setattr(registry, "_BACKENDS", (replace(backends()[0], available=lambda _: ["pip install 'a[b]'"]),))
    assert "pip install 'a[b]'" in examined().split("backends on cpu")[1]


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
