"""The rooms of the house and who may import whom, read from the source.

A rule that is only written down is broken within a month. These are checked, and each check is itself shown to
catch a planted violation.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "openvsa"

# A room may import itself, what is listed here, and the three rooms that everyone may import.
EVERYONE = {"errors", "config", "torch_op"}
MATHS = {"nn", "ops", "plan", "layout"}
APPLIED = MATHS | {"select", "models", "integrations"}
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "torch_op": set(),
    "layout": set(),
    "plan": {"layout"},
    "select": {"plan", "layout"},
    "ops": {"plan"},
    "nn": {"select", "ops", "plan", "layout"},
    "integrations": MATHS | {"select"},
    "models": MATHS,
    "parallel": MATHS,
    # These use the library as anyone does, so its public names ("__init__") are theirs too.
    "bench": APPLIED | {"__init__"},
    "evaluate": APPLIED | {"__init__"},
    "train": APPLIED | {"__init__"},
}
MAY_IMPORT["__init__"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# Importing a module may load the standard library, torch and this package. Modules below these names load more, and
# are therefore themselves loaded on demand: everyone else imports them inside functions.
ON_DEMAND = {
    "layout.kernels": {"triton"},
    "plan.kernels": {"triton"},
    "select.kernels": {"triton"},
    "ops.backends.triton": {"triton"},
    "models": {"diffusers", "safetensors"},
    "train": {"diffusers", "safetensors"},
    "cli.app": {"typer"},
    "cli.numbers": {"typer"},
    "cli.bench": {"rich"},
    "cli.doctor": {"rich"},
    "cli.audit": {"rich"},
    "cli.generate": {"rich"},
}

# Rooms that do not know any model by name, and the names.
NAMELESS_ROOMS = {"errors", "config", "torch_op", "layout", "plan", "select", "ops", "nn"}
MODEL_NAMES = ("wan", "hunyuan", "ltx", "cogvideo", "mochi", "llama", "diffusers", "transformers")


def module_name(path: Path) -> str:
    """`ops/backends/cpu.py` -> `ops.backends.cpu`; a package is named by its folder, the root by `__init__`."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def on_demand(module: str) -> str | None:
    """The entry of ON_DEMAND that a module falls under; `triton_backward` belongs to `triton`."""
    for name in ON_DEMAND:
        if module == name or module.startswith((name + ".", name + "_")):
            return name
    return None


def optional_packages(module: str) -> set[str]:
    return ON_DEMAND.get(on_demand(module) or "", set())


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST, *, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is imported. Imports for type checkers alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for branch in child.orelse:
                yield branch, at_import
                yield from walk(branch, at_import=at_import)
            continue
        yield child, at_import
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, at_import=at_import and not inside)


def imported_names(node: ast.AST, module: str, *, is_package: bool) -> list[str]:
    """The absolute dotted names an import statement may load, submodules included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ["openvsa", *([] if module == "__init__" else module.split("."))]
        if not is_package:
            package.pop()
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What one module does that the house does not allow."""
    tree = ast.parse(source)
    room = module.split(".")[0]
    if room not in MAY_IMPORT:
        return [f"{module}: {room!r} is not a room of the house"]
    found = []
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node, at_import in walk(tree):
        where = f"{module}:{getattr(node, 'lineno', '?')}"
        for name in imported_names(node, module, is_package=is_package or module == "__init__"):
            top, *rest = name.split(".")
            if top == "openvsa":
                found += [f"{where}: {why}" for why in own_import(module, room, rest, at_import=at_import)]
            elif at_import and top != "torch" and top not in sys.stdlib_module_names | optional_packages(module):
                found.append(f"{where}: imports the optional package {top!r} at import time")
            if room in NAMELESS_ROOMS and any(model in name.lower() for model in MODEL_NAMES):
                found.append(f"{where}: imports {name!r}, which the room {room!r} must not know")
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in {"os.environ", "os.getenv", "os.putenv"} and room != "config":
                found.append(f"{where}: reads the environment outside config.py")
        if isinstance(node, ast.Call) and at_import and ast.unparse(node.func).startswith("torch.cuda."):
            found.append(f"{where}: touches CUDA at import time")
        if room in NAMELESS_ROOMS and isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.lower()
            if id(node) not in docstrings and any(model in words.split() for model in MODEL_NAMES):
                found.append(f"{where}: the string {node.value!r} names a model")
    return found


def own_import(module: str, room: str, target: list[str], *, at_import: bool) -> Iterator[str]:
    """Why `module` may not import `openvsa.<target>`."""
    target_room = target[0] if target and target[0] in MAY_IMPORT else "__init__"
    if target_room == "__init__" and "__init__" not in MAY_IMPORT[room] and module != "__init__":
        # A public name taken from the top of the package hides which room it comes from.
        yield f"imports openvsa.{'.'.join(target)}: import it from where it is defined"
        return
    if module == "ops.reference":
        yield "the oracle must share no code with what it checks"
    if target_room != room and target_room not in MAY_IMPORT[room] | EVERYONE:
        yield f"{room!r} may not import {target_room!r}"
    name = ".".join(target)
    if module.startswith("ops.backends."):
        backend = module.split(".")[2].split("_")[0]
        if name.startswith("ops.reference"):
            yield "a backend may not use the oracle"
        if len(target) > 2 and target[:2] == ["ops", "backends"] and target[2].split("_")[0] != backend:
            yield f"a backend may not import another backend ({target[2]})"
    if at_import and on_demand(name) and not on_demand(module):
        yield f"openvsa.{name} loads an optional package: import it inside a function"


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_module_keeps_to_the_arrows(path: Path) -> None:
    assert violations(module_name(path), path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


PLANTED = {
    "select-imports-ops": ("select.pool", "from openvsa.ops import block_sparse_attention", "may not import 'ops'"),
    "relative-import": ("select.pool", "from ..ops import api", "may not import 'ops'"),
    "ops-imports-select": ("ops.api", "def f():\n    from openvsa.select import pool", "may not import 'select'"),
    "layout-imports-plan": ("layout.tile", "import openvsa.plan.block_plan", "may not import 'plan'"),
    "nn-imports-models": ("nn.attention", "from openvsa.models import tiny", "may not import 'models'"),
    "library-imports-cli": ("train.loop", "from openvsa.cli import app", "may not import 'cli'"),
    "public-name-inside": ("nn.attention", "from openvsa import TileLayout", "import it from where it is defined"),
    "package-inside": ("nn.attention", "import openvsa", "import it from where it is defined"),
    "unknown-room": ("misc.helpers", "", "not a room"),
    "oracle-imports-ours": ("ops.reference", "from openvsa.errors import ShapeError", "must share no code"),
    "backend-imports-oracle": ("ops.backends.cpu", "from openvsa.ops import reference", "may not use the oracle"),
    "backend-imports-backend": (
        "ops.backends.cpu",
        "def f():\n    from openvsa.ops.backends import triton",
        "may not import another backend",
    ),
    "backend-imports-sibling": ("ops.backends.cpu", "from . import flex", "may not import another backend"),
    "optional-at-import": ("evaluate.video", "import av", "optional package 'av'"),
    "optional-in-class-body": ("evaluate.video", "class A:\n    import diffusers", "optional package 'diffusers'"),
    "optional-in-try": ("plan.convert", "try:\n    import numpy\nexcept ImportError:\n    pass", "package 'numpy'"),
    "lazy-module-at-import": ("ops.registry", "from openvsa.ops.backends import triton", "inside a function"),
    "heavy-public-name": ("__init__", "from openvsa.models import load_bundled", "inside a function"),
    "environment": ("ops.registry", "import os\ndef f():\n    return os.environ['X']", "outside config.py"),
    "cuda-at-import": ("ops.registry", "import torch\nGPU = torch.cuda.is_available()", "CUDA at import time"),
    "model-in-a-string": ("select.rank", "KIND = 'wan style'", "names a model"),
    "model-package": ("nn.attention", "def f():\n    import diffusers", "must not know"),
}


@pytest.mark.parametrize(("module", "source", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_caught(module: str, source: str, expected: str) -> None:
    found = violations(module, source)
    assert any(expected in violation for violation in found), found


ALLOWED = {
    "stdlib-and-torch": ("plan.block_plan", "import math\nimport torch\nfrom openvsa.layout import tile"),
    "optional-in-function": ("evaluate.video", "def f():\n    import av"),
    "optional-for-types": ("models.dit", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
    "triton-in-its-backend": ("ops.backends.triton_bwd", "import triton\nfrom . import triton_fwd"),
    "errors-from-anywhere": ("layout.tile", "from openvsa.errors import ShapeError\nfrom ..config import Budget"),
    "train-uses-public-names": ("train.loop", "import openvsa\nfrom openvsa import sparsify"),
    "on-demand-uses-on-demand": ("train.loop", "from openvsa.models import load_bundled"),
    "train-uses-integrations": ("train.loop", "from openvsa.integrations import diffusers"),
    "cuda-in-function": ("ops.registry", "import torch\ndef f():\n    return torch.cuda.is_available()"),
}


@pytest.mark.parametrize(("module", "source"), ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def loaded_by(statement: str) -> set[str]:
    """The packages in `sys.modules` after `statement`, in a fresh interpreter; the standard library left out."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split()) - sys.stdlib_module_names


def test_importing_openvsa_loads_torch_and_nothing_else() -> None:
    assert loaded_by("import openvsa, openvsa.cli") - loaded_by("import torch") == {"openvsa"}
