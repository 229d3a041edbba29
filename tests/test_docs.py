"""The documentation does what it says: its Python runs, its commands exist, its generated parts are fresh."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
from typer.main import get_command

import tiny_pipelines
from openvsa.cli.app import app
from openvsa.integrations import site
from openvsa.integrations.branch import add_branch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["reason"])
        for found in FENCE.finditer(text)
        if found["language"] in languages
    ]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages_with("python"), ids=page_id)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order and share their names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # Line numbers of a failure are those of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.not_run is None:
            exec(code, names)


WITH_WEIGHTS = [
    block for page in PAGES for block in blocks(page, "python") if block.not_run and "WanPipeline" in block.code
]


@pytest.mark.parametrize("block", WITH_WEIGHTS, ids=lambda block: page_id(block.page))
def test_what_needs_the_weights_of_wan_runs_with_others(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny pipeline, in few steps, on the CPU."""
    folder = tiny_pipelines.wan(tmp_path / "wan")
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    add_branch(transformer)
    transformer.save_pretrained(folder / "transformer")
    load, call = diffusers.WanPipeline.from_pretrained, diffusers.WanPipeline.__call__
    small = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda name, **given: load(folder, **given))
    monkeypatch.setattr(
        diffusers.WanPipeline, "__call__", lambda pipe, text, **given: call(pipe, text, **given | small)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(folder))
    monkeypatch.setattr(site, "objection", lambda *about: "")  # so short a video would not be faster
    names: dict[str, Any] = {}
    exec(compile(block.code.replace('"cuda"', '"cpu"'), str(block.page), "exec"), names)
    assert names["handle"].report().executed_density < 1


PIPELINE_CALLS = [
    (block, found[1])
    for page in PAGES
    for block in blocks(page, "python")
    if (found := re.search(r"(\w+Pipeline)\.from_pretrained", block.code)) and "pipe(" in block.code
]


@pytest.mark.parametrize(
    ("block", "pipeline"), PIPELINE_CALLS, ids=lambda of: of if isinstance(of, str) else of.page.stem
)
def test_a_pipeline_takes_what_a_page_passes(block: Block, pipeline: str) -> None:
    """Blocks that need weights are not run; Diffusers says what its pipelines take."""
    takes = inspect.signature(getattr(diffusers, pipeline).__call__)
    calls = [node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "pipe"]
    assert calls
    for call in calls:
        bound = takes.bind(None, *call.args, **{str(given.arg): given.value for given in call.keywords})
        assert isinstance(bound.arguments["prompt"], ast.Constant)


INLINE = re.compile(r"(?<!`)`((?:openvsa|make|pip) [^`]+)`(?!`)")


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Those of code blocks, and those within the text."""
    for block in blocks(page, "bash", "sh"):
        for number, line in enumerate(block.code.splitlines(), block.line):
            yield from ((number, words) for words in programs(line))
    prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())
    for found in INLINE.finditer(prose):
        yield from ((prose.count("\n", 0, found.start()) + 1, words) for words in programs(found[1]))


def programs(line: str) -> Iterator[list[str]]:
    """The words of each program of a line, without the variables set for it."""
    words = shlex.split(line, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        one, words = words[:end], words[end + 1 :]
        while one and re.fullmatch(r"[A-Z_]+=\S*", one[0]):
            one.pop(0)
        if one:
            yield one


def complaint(words: list[str]) -> str | None:
    """Why a command of the documentation cannot be right, or None."""
    program, *rest = words
    if program == "openvsa":
        known = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
        if not rest or rest[0] not in known:
            return f"no command {rest[:1]}; there are {sorted(known)}"
        options = {flag for parameter in known[rest[0]].params for flag in parameter.opts} | {"--help"}
        unknown = [word for word in rest[1:] if word.startswith("-") and word.split("=")[0] not in options]
        return f"no options {unknown}" if unknown else None
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in rest if "=" not in word and word not in targets]
        return f"no targets {unknown}" if unknown else None
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {extra for found in re.findall(r"\[([\w,]+)\]", " ".join(rest)) for extra in found.split(",")}
        return f"no extras {named - set(extras)}" if named - set(extras) else None
    if program == "compute-sanitizer" and "python" in rest:
        return complaint(rest[rest.index("python") :])
    if program == "python" and rest[:2] == ["-m", "pytest"]:
        missing = [word for word in rest[2:] if word.startswith("tests") and not (ROOT / word).exists()]
        return f"no tests {missing}" if missing else None
    if program == "python":
        return None if rest and (ROOT / rest[0]).is_file() else f"no file {rest[:1]}"
    return f"unknown program {program!r}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_a_page_exist(page: Path) -> None:
    wrong = [f"line {number}: {why}" for number, words in commands(page) if (why := complaint(words))]
    assert wrong == []


def test_commands_are_found_wherever_they_stand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Say `openvsa one`,\nor:\n\n```bash\nA=1 openvsa two && make three  # why\n```\n\n`pip four`\n")
    assert list(commands(page)) == [
        (5, ["openvsa", "two"]),
        (5, ["make", "three"]),
        (1, ["openvsa", "one"]),
        (8, ["pip", "four"]),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "openvsa paint",
        "openvsa generate --colour red",
        "make coffee",
        "pip install 'openvsa[tea]'",
        "python nowhere.py",
        "python -m pytest tests/nowhere",
        "compute-sanitizer --tool memcheck python nowhere.py",
        "rm x",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    assert complaint(shlex.split(command)) is not None


@pytest.mark.parametrize(
    "script", ["doc_tables.py", "doc_figures.py", "doc_performance.py", "doc_models.py", "doc_audit.py"]
)
def test_generated_parts_are_fresh(script: str) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_readme_pictures_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page_id(page)} shows {target}, which is not there"


def test_no_place_is_left_to_fill() -> None:
    assert [page_id(page) for page in PAGES if "TO FILL" in page.read_text()] == []
