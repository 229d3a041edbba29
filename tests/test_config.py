"""Budgets: what they keep, and what is refused; facts about the machine."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from openvsa import Budget, BudgetError
from openvsa.config import machine_fact, triton_interpret


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of top_k, keep_ratio and top_p, got none"),
        ({"top_k": 2, "keep_ratio": 0.5}, "exactly one of top_k, keep_ratio and top_p, got .*top_k.*keep_ratio"),
        ({"keep_ratio": 0}, r"keep_ratio, the density, must be in \(0, 1\], got 0"),
        ({"keep_ratio": 2}, r"keep_ratio, the density, must be in \(0, 1\], got 2"),
        ({"keep_ratio": float("nan")}, r"keep_ratio, the density, must be in \(0, 1\], got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"top_k": 0}, "top_k must be a whole number of blocks >= 1, got 0"),
        ({"top_k": 2.5}, r"top_k must be a whole number of blocks >= 1, got 2\.5"),
        ({"top_k": float("inf")}, "top_k must be a whole number of blocks >= 1, got inf"),
        ({"top_k": 2, "max_blocks": 0}, "max_blocks must be a whole number of blocks >= 1, got 0"),
        ({"top_k": 2, "min_blocks": 0}, "min_blocks must be a whole number of blocks >= 1, got 0"),
        ({"top_k": 2, "min_blocks": 1.5}, r"min_blocks must be a whole number of blocks >= 1, got 1\.5"),
        ({"top_k": 2, "min_blocks": 5, "max_blocks": 4}, "got min_blocks=5 and max_blocks=4"),
        ({"top_k": 2, "keep_first": -1}, "keep_first must be a whole number of blocks >= 0, got -1"),
        ({"top_k": 2, "keep_first": None}, "keep_first must be a whole number of blocks >= 0, got None"),
        ({"top_k": 2, "min_blocks": None}, "min_blocks must be a whole number of blocks >= 1, got None"),
        ({"top_k": "3"}, "top_k must be a whole number of blocks >= 1, got '3'"),
        ({"top_k": 2, "keep_self": "no"}, "keep_self must be True or False, got 'no'"),
        ({"keep_ratio": np.float32(0.5)}, r"an int or a float, got np\.float32\(0\.5\)"),
    ],
)
def test_malformed_budgets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**settings)


@pytest.mark.parametrize(
    ("budget", "blocks", "kept"),
    [
        (Budget(top_k=4), 10, 4),
        (Budget(top_k=4), 3, 3),
        (Budget(keep_ratio=0.25), 10, 3),
        (Budget(keep_ratio=0.25, min_blocks=5), 10, 5),
        (Budget(keep_ratio=0.9, max_blocks=5), 10, 5),
        (Budget(keep_ratio=0.25, min_blocks=50), 10, 10),
        (Budget(top_p=0.5), 10, 10),
        (Budget(top_p=0.5, max_blocks=4), 10, 4),
        (Budget(top_k=1, keep_self=True), 10, 1),
        (Budget(top_k=3, keep_first=2, keep_self=True), 10, 3),
        (Budget(top_k=1, keep_first=5), 1, 1),
    ],
)
def test_how_many_blocks(budget: Budget, blocks: int, kept: int) -> None:
    assert budget.blocks(blocks) == kept


def test_numbers_of_numpy_become_plain_ones() -> None:
    """Files of settings hold no others."""
    budget = Budget(top_k=np.int64(3), min_blocks=np.int32(2), keep_first=np.uint8(1))
    assert budget == Budget(top_k=3, min_blocks=2, keep_first=1)
    assert [type(x) for x in (budget.top_k, budget.min_blocks, budget.keep_first)] == [int] * 3
    assert type(Budget(keep_ratio=np.float64(0.5)).keep_ratio) is float


def test_budgets_are_values() -> None:
    assert Budget(top_k=4) == Budget(top_k=4)
    assert hash(Budget(top_k=4)) == hash(Budget(top_k=4))
    with pytest.raises(AttributeError):
        Budget(top_k=4).top_k = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("value", "on"), [(None, False), ("0", False), ("", False), ("1", True), ("true", True)])
def test_triton_interpret(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_interpret() is on


def test_a_machine_fact_is_compiled_in() -> None:
    assert vars(machine_fact(lambda: None)) == vars(torch.compiler.assume_constant_result(lambda: None))

    @machine_fact
    def untraceable(device: torch.device) -> tuple[int, int] | None:
        return (9, 0) if importlib.util.find_spec("torch") and device.type == "cpu" else None

    def double_there(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if untraceable(x.device) == (9, 0) else x

    assert torch.compile(double_there, fullgraph=True, backend="eager")(torch.ones(1)) == 2
