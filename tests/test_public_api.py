"""The public surface: small, documented, with shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import openvsa

PUBLIC = {
    "BlockPlan",
    "Budget",
    "BudgetError",
    "MissingExtraError",
    "OpenVSAError",
    "PlanError",
    "ShapeError",
    "SparsityConfig",
    "TileLayout",
    "UnsupportedError",
    "block_sparse_attention",
    "merge",
    "nn",
    "sparsify",
    "video_sparse_attention",
}
API_PAGE = Path(__file__).parents[1] / "docs" / "reference" / "api.md"
SHAPE_LETTER = re.compile(r"\b(B|S|Sq|Skv|N|NQ|NK|K)\b")


def functions() -> Iterator[tuple[str, Callable]]:
    """Every function and public method that a user can reach from the public names."""
    for name in [*sorted(PUBLIC - {"nn"}), "nn.VideoSparseAttention"]:
        value = openvsa.nn.VideoSparseAttention if name.startswith("nn.") else getattr(openvsa, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for member_name, member in vars(value).items():
                member = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
                if inspect.isfunction(member) and not member_name.startswith("_"):
                    yield f"{name}.{member_name}", member


FUNCTIONS = dict(functions())


def test_the_public_names_are_these() -> None:
    assert set(openvsa.__all__) == PUBLIC
    assert set(dir(openvsa)) >= PUBLIC  # what a shell completes, also names that are loaded late


def test_every_public_name_is_on_the_api_page() -> None:
    listed = set(re.findall(r"^::: openvsa\.(\w+)", API_PAGE.read_text(), re.MULTILINE))
    assert listed >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(openvsa, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_has_a_docstring(name: str) -> None:
    assert (FUNCTIONS[name].__doc__ or "").strip()


def speaks_of_tensors(function: Callable) -> bool:
    return any("Tensor" in str(annotation) for annotation in function.__annotations__.values())


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if speaks_of_tensors(FUNCTIONS[name])])
def test_function_of_tensors_states_shapes(name: str) -> None:
    assert SHAPE_LETTER.search(FUNCTIONS[name].__doc__ or "")


def documented_parameters(docstring: str) -> list[str]:
    """The names in the section `Args:`; an entry such as `k, v: ...` names two."""
    section = re.search(
        r"^ *Args:\n(.*?)(?=\n *\n|\n *(?:Returns|Raises|Yields):|\Z)", docstring, re.DOTALL | re.MULTILINE
    )
    if section is None:
        return []
    lines = section[1].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    entries = [line.strip() for line in lines if len(line) - len(line.lstrip()) == indent]
    return [name.strip() for entry in entries for name in entry.split(":")[0].split(",")]


@pytest.mark.parametrize("name", [*FUNCTIONS, *sorted(n for n in PUBLIC if inspect.isclass(getattr(openvsa, n)))])
def test_documented_parameters_exist(name: str) -> None:
    value = FUNCTIONS.get(name) or getattr(openvsa, name)
    documented = documented_parameters(inspect.getdoc(value) or "")
    accepted = inspect.signature(value).parameters if documented else {}
    assert set(documented) <= set(accepted)


def test_documented_parameters_are_found() -> None:
    found = documented_parameters(inspect.getdoc(openvsa.block_sparse_attention) or "")
    assert found == ["q", "k", "v", "plan", "scale", "backend", "return_lse"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        openvsa.nonsense  # noqa: B018
