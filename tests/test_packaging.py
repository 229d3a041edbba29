"""What is declared about the package agrees with the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import openvsa
from openvsa.cli.doctor import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "openvsa"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION_OF = {"PIL": "pillow", "flash_attn": "flash-attn-4", "yaml": "pyyaml"}


def distributions(extra: str) -> set[str]:
    """What an extra installs, extras of our own resolved."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        own = re.match(r"openvsa\[([\w,]+)\]", requirement)
        if own:
            found.update(*(distributions(name) for name in own[1].split(",")))
        else:
            found.add(re.match(r"[\w-]+", requirement)[0])  # pyright: ignore[reportOptionalSubscript]
    return found


def required() -> list[tuple[str, str, str]]:
    """Each `require(module, extra=...)` in the source: where, the module, the extra."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "require":
                module, extra = node.args[0], node.keywords[0].value
                if isinstance(module, ast.Constant) and isinstance(extra, ast.Constant):
                    found.append((f"{path.relative_to(SOURCE)}:{node.lineno}", module.value, extra.value))
    return found


@pytest.mark.parametrize(("where", "module", "extra"), required(), ids=lambda value: str(value))
def test_a_hint_names_an_extra_that_helps(where: str, module: str, extra: str) -> None:
    top = module.split(".")[0]
    assert DISTRIBUTION_OF.get(top, top) in distributions(extra), where


@pytest.mark.parametrize("extra", EXTRAS)
def test_doctor_knows_what_an_extra_installs(extra: str) -> None:
    assert set(EXTRAS[extra]) == distributions(extra)


def test_one_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert openvsa.__version__ == PROJECT["version"] == newest[1]


def test_only_torch_is_needed() -> None:
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]] == ["torch"]


def test_source_distribution_can_be_tested(tmp_path: Path) -> None:
    """It holds what the tests and the generated parts of the documentation read: the results, too."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    for folder, pattern in {"benchmarks": "*.json", "docs": "*.md", "scripts": "*", "tests": "*.py"}.items():
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= packed
    assert {"Makefile", "constraints.txt", "mkdocs.yml", "README.md", "CHANGELOG.md", "NOTICE", "LICENSE"} <= packed


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("openvsa/")}
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {f"openvsa/{path.relative_to(SOURCE).as_posix()}" for path in files}
    assert "openvsa/py.typed" in packed
