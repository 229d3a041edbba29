"""SparsityConfig: checked, immutable, to files and back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import openvsa
from openvsa import Budget, SparsityConfig
from openvsa.integrations import families as families_room
from openvsa.integrations.presets import PRESETS
from openvsa.select import BudgetTable, PooledTopK, ReleasedVSA
from tiny_wan import run, tiny_wan

FULL = SparsityConfig(
    budget=Budget(top_p=0.9, min_blocks=2),
    selector=PooledTopK(length_bias=True),
    tile=(2, 4, 8),
    q_tiles=(1, 1, 2),
    steps={0: 0.5, 3: 0.25},
    layers={"blocks.0.attn1": (0.5, 1.0), "blocks.1.attn1": 0.125},
    dense_first_steps=2,
    dense_last_steps=1,
    dense_layers=(0, "blocks.1.attn1"),
    min_tokens=5000,
    reuse_steps=2,
    backend="cpu",
    strict=False,
)


@pytest.mark.parametrize("config", [SparsityConfig(density=0.1), FULL], ids=["small", "full"])
@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_files_hold_everything(config: SparsityConfig, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings.{ending}"
    config.save(path)
    assert SparsityConfig.load(path) == config


def test_a_file_says_only_what_is_not_default() -> None:
    assert SparsityConfig(density=0.1).to_dict() == {"density": 0.1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "either density or budget"),
        ({"density": 0.1, "budget": Budget(top_k=2)}, "either density or budget"),
        ({"density": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"density": 0.1, "steps": {0: 0}}, r"must be in \(0, 1\], got 0"),
        ({"density": 0.1, "steps": {-1: 0.5}}, "whole numbers"),
        ({"density": 0.1, "layers": {"a": (0.5, 2.0)}}, r"must be in \(0, 1\], got 2"),
        ({"density": 0.1, "dense_first_steps": -1}, "dense_first_steps must be a whole number >= 0, got -1"),
        ({"density": 0.1, "reuse_steps": 0}, "reuse_steps must be a whole number >= 1, got 0"),
        ({"density": 0.1, "min_tokens": 1.5}, "min_tokens must be a whole number >= 0, got 1.5"),
        ({"density": 0.1, "min_tokens": True}, "min_tokens must be a whole number >= 0, got True"),
        ({"density": "0.1"}, r"must be a number in \(0, 1\].*got '0.1'"),
        ({"density": True}, "must be a number .*got True"),
        ({"budget": 0.1}, "budget must be a Budget such as .* got 0.1; for a table of densities give it"),
        ({"budget": "table.json"}, "budget must be a Budget"),
        ({"density": 0.1, "tile": 4}, "tile must be whole numbers >= 1, one for each axis .* got 4"),
        ({"density": 0.1, "tile": (0, 4, 4)}, "tile must be whole numbers >= 1"),
        ({"density": 0.1, "tile": "444"}, "tile must be"),
        ({"density": 0.1, "q_tiles": 2}, "q_tiles must be whole numbers >= 1, one for each axis .* got 2"),
        ({"density": 0.1, "q_tiles": (1, 0, 1)}, "q_tiles must be"),
        ({"density": 0.1, "q_tiles": None}, r"q_tiles must be .* or \(\); got None"),
        ({"density": 0.1, "steps": [0.5]}, r"steps must be a mapping .* got \[0.5\]"),
        ({"density": 0.1, "steps": {1: (0.5, 0.5)}}, "steps must be a mapping"),
        ({"density": 0.1, "layers": {"a": ()}}, "layers must be a mapping"),
        ({"density": 0.1, "layers": {0: 0.5}}, "layers must be a mapping"),
        ({"density": 0.1, "dense_layers": "blocks.0.attn1"}, "dense_layers must be numbers or names"),
        ({"density": 0.1, "dense_layers": (1.5,)}, "dense_layers must be"),
        ({"density": 0.1, "selector": PooledTopK}, r"selector must be a selector such as PooledTopK\(\)"),
        ({"density": 0.1, "backend": "cuda"}, "backend must be 'auto' or one of .*hopper.* got 'cuda'"),
        ({"density": 0.1, "strict": "false"}, "strict must be True or False; got 'false'"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(openvsa.OpenVSAError, match=said):
        SparsityConfig(**wrong)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must be an object"),
        ("{", "cannot be parsed"),
        ('{"density": 0.1, "sparsity": 0.9}', "unknown settings sparsity; known are density"),
        ('{"density": 0.1, "selector": {"name": "Best"}}', r"\(PooledTopK, ReleasedVSA\), got 'Best'"),
        ('{"density": 0.1, "selector": {"name": "Selector"}}', "got 'Selector'"),
        (
            '{"density": 0.1, "selector": {"name": "PooledTopK", "foo": 1}}',
            "unknown settings of selector PooledTopK foo; known are scale, length_bias",
        ),
        ('{"density": 0.1, "selector": {"name": "ReleasedVSA"}}', "selector ReleasedVSA must have sparsity, got {}"),
        ('{"density": "much"}', "must be a number"),
        ('{"density": 0.1, "steps": {"first": 0.5}}', r"steps must be a mapping .* got \{'first': 0\.5\}"),
        ('{"budget": 0.1}', "settings of budget must be an object of names and values, got 0.1; names are top_k"),
        ('{"budget": [1]}', r"settings of budget must be an object of names and values, got \[1\]"),
        ('{"budget": {"top": 1}}', "unknown settings of budget top; known are top_k"),
        ('{"density": 0.1, "backend": ["cpu"]}', r"backend must be .* got \['cpu'\]"),
        ('{"density": 0.1, "dense_layers": "blocks.0.attn1"}', "dense_layers must be"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(openvsa.OpenVSAError, match=said) as error:
        SparsityConfig.load(path)
    assert "settings.json" in str(error.value)
    with pytest.raises(openvsa.OpenVSAError, match="cannot read"):
        SparsityConfig.load(tmp_path / "none.json")


def test_a_file_may_name_a_selector_alone(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("density: 0.1\nselector: PooledTopK\n")
    assert SparsityConfig.load(path) == SparsityConfig(density=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("density: 0.1\n1: 2\n", "unknown settings 1; known are density"),
        ("density: 0.1\nsteps:\n", "steps must be a mapping .* got None"),
        ("density: 0.1\nsteps: {1.7: 0.5}\n", r"steps must be a mapping .* got \{1\.7: 0\.5\}"),
    ],
)
def test_what_only_yaml_can_get_wrong_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(openvsa.OpenVSAError, match=said):
        SparsityConfig.load(path)


def test_a_table_may_be_yaml(tmp_path: Path) -> None:
    table = BudgetTable(0.3, {"blocks.0.attn1": (0.2, 0.4)}, (1, 2, 2))
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(json.loads(table.to_json())))
    assert SparsityConfig.load(path) == SparsityConfig.of_table(table)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(openvsa.OpenVSAError, match="cannot write the settings"):
        SparsityConfig(density=0.1).save(tmp_path / "none" / "settings.json")


def test_settings_and_tables_go_to_other_processes() -> None:
    table = BudgetTable(0.5, {"blocks.0.attn1": (0.25, 0.75)}, tile=(1, 2, 2))
    for value in (FULL, SparsityConfig(density=0.1), table):
        assert pickle.loads(pickle.dumps(value)) == value
        assert copy.deepcopy(value) == value


def test_a_selector_of_ones_own_cannot_be_written() -> None:
    config = SparsityConfig(density=0.1, selector=lambda q, k, layout, budget: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(openvsa.OpenVSAError, match=r"none of openvsa\.select"):
        config.to_dict()


def test_it_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.density = 0.5  # type: ignore[misc]
    assert dataclasses.replace(FULL, min_tokens=1).steps == FULL.steps


def test_sparsify_takes_a_config_or_a_table_alone(tmp_path: Path) -> None:
    model = tiny_wan()
    table = BudgetTable(0.5, {"blocks.0.attn1": (0.25, 0.75), "blocks.1.attn1": (0.5, 0.5)}, tile=(1, 2, 2))
    table.save(tmp_path / "budget.json")
    with openvsa.sparsify(model, budget=table) as handle:
        assert handle.config is not None
        assert (handle.config.layers, handle.config.tile) == (table.layers, (1, 2, 2))
        first = run(model)
        assert [layer.requested_density for layer in handle.report().layers] == [0.5, 0.5]
    with openvsa.sparsify(model, budget=str(tmp_path / "budget.json")):
        assert torch.equal(run(model), first)
    for extra in ({"density": 0.5}, {"tile": (1, 2, 2)}, {"backend": "cpu"}):
        with pytest.raises(openvsa.BudgetError, match="part of a config"):
            openvsa.sparsify(model, config=SparsityConfig(density=0.5), **extra)


@pytest.mark.parametrize("config", [{"density": 0.5}, "wan", Budget(top_k=2)])
def test_settings_of_another_type_are_refused(config: Any) -> None:
    model = tiny_wan()
    with pytest.raises(openvsa.OpenVSAError, match="config must be a SparsityConfig, got"):
        openvsa.sparsify(model, config=config)
    with openvsa.sparsify(model, 0.5) as handle, pytest.raises(openvsa.OpenVSAError, match="must be a SparsityConfig"):
        handle.config = config
    for budget in (0.5, {"top_k": 2}):
        with pytest.raises(openvsa.BudgetError, match="budget must be a Budget"):
            openvsa.sparsify(model, budget=budget)  # pyright: ignore[reportArgumentType]


def test_a_budget_that_a_table_would_hide_is_refused() -> None:
    model = tiny_wan()
    table = BudgetTable(0.5, {"blocks.0.attn1": (0.25, 0.75), "blocks.1.attn1": (0.5, 0.5)})
    with openvsa.sparsify(model, budget=table) as handle:
        with pytest.raises(openvsa.BudgetError, match=r"every layer has a density of its own .* set handle\.config"):
            handle.density = 0.9
        handle.config = SparsityConfig(density=0.5, layers={"blocks.0.attn1": 0.25})
        handle.density = 0.9
        assert handle.density == 0.9


def test_the_handle_changes_settings_while_it_is_on() -> None:
    model = tiny_wan()
    with openvsa.sparsify(model, config=SparsityConfig(density=0.5, tile=(1, 2, 2), min_tokens=10**6)) as handle:
        dense = run(model)
        handle.config = SparsityConfig(density=0.2, tile=(3, 3, 3))
        assert not torch.equal(run(model), dense)
        assert handle.report().layers[0].tile == (3, 3, 3)
        handle.density = 0.5
        assert handle.config == SparsityConfig(budget=Budget(keep_ratio=0.5), tile=(3, 3, 3))
        with pytest.raises(openvsa.BudgetError, match=r"^keep_ratio, the density, must be in \(0, 1\], got 0;"):
            handle.density = 0
        assert handle.density == 0.5


def test_a_table_is_settings_too(tmp_path: Path) -> None:
    table = BudgetTable(0.25, {"blocks.0.attn1": (0.5, 0.125), "blocks.1.attn1": (0.25, 0.25)}, (1, 2, 2))
    table.save(tmp_path / "table.json")
    config = SparsityConfig.load(tmp_path / "table.json")
    assert config == SparsityConfig(density=0.25, layers=table.layers, tile=(1, 2, 2))
    model = tiny_wan()
    with openvsa.sparsify(model, budget=tmp_path / "table.json") as handle:
        assert handle.config == config
    joined = SparsityConfig.of_table(table, dense_first_steps=2, tile=None)
    assert (joined.dense_first_steps, joined.tile, joined.layers) == (2, None, table.layers)
    (tmp_path / "table.json").write_text(table.to_json().replace('"version": 1', '"version": 99'))
    with pytest.raises(openvsa.BudgetError, match=r"version 1, got .* and 99"):
        SparsityConfig.load(tmp_path / "table.json")


# -- presets --------------------------------------------------------------------------------------------------------


def test_every_family_has_a_preset_and_its_steps_scale() -> None:
    families = {path.stem for path in Path(families_room.__file__).parent.glob("*.py")} - {
        "__init__", "base", "coordinates", "joint"
    }  # fmt: skip
    assert set(PRESETS) == families | {"vsa-1.3b", "vsa-14b"}
    for name in PRESETS:
        config = SparsityConfig.preset(name)
        assert SparsityConfig.from_dict(config.to_dict()) == config
        assert SparsityConfig.preset(name, steps=4).dense_first_steps <= 1


def test_a_preset_can_be_changed() -> None:
    assert SparsityConfig.preset("wan") == SparsityConfig(density=0.25, dense_first_steps=10, dense_layers=(0,))
    assert SparsityConfig.preset("wan", steps=30, density=0.5).dense_first_steps == 6
    assert SparsityConfig.preset("wan", budget=Budget(top_k=9)).density is None
    method = ReleasedVSA(0.9)
    trained = SparsityConfig(budget=method.budget, selector=method, tile=(4, 4, 4))
    assert SparsityConfig.preset("vsa-14b") == trained
    with pytest.raises(openvsa.OpenVSAError, match="there is no preset 'x'; choose from wan, "):
        SparsityConfig.preset("x")
    with pytest.raises(openvsa.OpenVSAError, match="steps must be a whole number >= 1, got 0"):
        SparsityConfig.preset("wan", steps=0)
    with pytest.raises(openvsa.BudgetError, match="must be in"):
        SparsityConfig.preset("wan", density=2)


def test_a_model_takes_a_preset() -> None:
    model = tiny_wan(3)
    with openvsa.sparsify(model, config=SparsityConfig.preset("wan", steps=5, min_tokens=0)) as handle:
        for level in (900.0, 700.0):
            run(model, level)
        assert [layer.sparse_calls for layer in handle.report().layers] == [0, 1, 1]
