"""The file of a budget table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openvsa.errors import BudgetError
from openvsa.select import BudgetTable

TABLE = BudgetTable(0.25, {"blocks.0.attn1": (0.125, 0.375), "blocks.1.attn1": (0.3, 0.2)}, tile=(4, 2, 8))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    assert BudgetTable.load(tmp_path / "table.json") == TABLE
    assert TABLE.mean == pytest.approx(0.25)


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TABLE.layers["blocks.0.attn1"] = (1.0, 1.0)  # pyright: ignore[reportIndexIssue]


def changed(**entries: object) -> str:
    return json.dumps(json.loads(TABLE.to_json()) | entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "no budget table"),
        ("[]", "no budget table"),
        ("{}", "no budget table"),
        (TABLE.to_json().replace('"version": 1', '"version": 2'), "version 1, got 'openvsa-budget' and 2"),
        (TABLE.to_json().replace("0.375", "1.5"), r"must be in \(0, 1\], got \[0.125, 1.5\] for 'blocks.0.attn1'"),
        (changed(layers={}), "at least one layer"),
        (changed(layers={"a": []}), "got \\[\\] for 'a'"),
        (changed(layers={"a": "11"}), "a list of numbers each, one for each head, got {'a': '11'}"),
        (changed(layers={"a": 0.5}), "a list of numbers each, one for each head, got {'a': 0.5}"),
        (changed(layers={"a": [True, "0.5"]}), "a list of numbers each"),
        (changed(layers=[[0.5]]), "a list of numbers each"),
        (changed(tile="444"), "tile of a budget table must be whole numbers such as .*, got 444"),
        (changed(tile=[2.5, 4, 4]), "tile of a budget table must be whole numbers"),
        (changed(density="0.25"), "density of a budget table must be a number, got '0.25'"),
        (changed(dense_first_steps=2), r"nothing else, got .*, dense_first_steps; .* SparsityConfig\.of_table"),
        ('{"format": "openvsa-budget", "version": 1, "density": 0.25, "layers": {"a": [0.25]}}', "has format, .*tile"),
    ],
)
def test_what_is_no_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        BudgetTable.from_json(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"cannot read the budget table .*nowhere\.json"):
        BudgetTable.load(tmp_path / "nowhere.json")
