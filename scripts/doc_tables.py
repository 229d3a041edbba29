"""Write the tables of the documentation that follow from the code, between their markers.

python scripts/doc_tables.py            # write them
python scripts/doc_tables.py --check    # fail if a page on disk differs
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from openvsa import TileLayout
from openvsa.ops.capability import Backend
from openvsa.ops.registry import backends

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WEIGHTS = ROOT / "src" / "openvsa" / "models" / "weights"

# Latent lattices (T, H, W) that models use at their usual sizes.
LATTICES = {
    "Wan 14B, 720p, 81 frames": (21, 45, 80),
    "Wan, 480p, 81 frames": (21, 30, 52),
    "Wan2.2 5B, 720p": (31, 22, 40),
    "HunyuanVideo, 720p, 129 frames": (33, 45, 80),
    "HunyuanVideo 1.5, 720p": (31, 45, 80),
    "CogVideoX, 480p": (13, 30, 45),
    "LTX": (21, 16, 22),
    "Mochi": (28, 30, 53),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tile_fit() -> str:
    rows = []
    for name, grid in LATTICES.items():
        paper, fit = TileLayout(grid, (4, 4, 4)), TileLayout.fit(grid)
        pairs = (fit.num_blocks / paper.num_blocks) ** 2
        rows.append(
            [
                name,
                f"{'×'.join(map(str, grid))} = {paper.num_tokens:,}",
                f"{paper.num_blocks:,}",
                f"{paper.num_tokens / paper.num_blocks:.1f}",
                "×".join(map(str, fit.tile)),
                f"{fit.num_blocks:,}",
                f"{fit.num_tokens / fit.num_blocks:.1f}",
                f"{1 - pairs:.0%}",
            ]
        )
    head = [
        "model",
        "lattice",
        "blocks with 4×4×4",
        "tokens a block",
        "`fit`",
        "blocks",
        "tokens a block",
        "fewer pairs",
    ]
    return table(head, rows)


def support(backend: Backend) -> list[str]:
    low, high = backend.head_dim or (1, 0)
    return [
        f"`{backend.name}`",
        backend.summary,
        "any" if backend.device_types is None else ", ".join(backend.device_types),
        ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes),
        "any" if backend.head_dim is None else f"{low} to {high}",
        "any" if backend.max_block is None else f"up to {backend.max_block} tokens",
        "yes" if backend.ragged else "no",
    ]


def backend_matrix() -> str:
    head = ["backend", "what it is", "tensors on", "dtypes", "head_dim", "blocks", "ragged blocks"]
    return table(head, [support(backend) for backend in backends()])


def training_run() -> str:
    """What the manifest of the bundled model says about its making."""
    facts = json.loads((WEIGHTS / "manifest.json").read_text())["facts"]
    recipe, files = facts["recipe"], sorted(WEIGHTS.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    rows = [
        ["Steps", f"{facts['steps']:,} of {recipe['batch_size']} clips each, in {facts['minutes']:g} minutes"],
        ["Machine", f"{facts['device']}, torch {facts['torch']}"],
        ["Parameters", f"{sum(map(parameters, files)):,}, in {size / 1e6:.1f} MB of safetensors"],
    ]
    for density, loss in facts["evaluation"]["held_out"].items():
        seen = facts["evaluation"]["training"][density]
        rows.append([f"Loss at density {density}", f"{loss:.4f} on held-out shots, {seen:.4f} on training shots"])
    return table(["", ""], rows)


def parameters(file: Path) -> int:
    """The number of values in a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


TABLES = {
    ("layouts.md", "tile-fit"): tile_fit,
    ("backends.md", "backends"): backend_matrix,
    ("model-card.md", "training-run"): training_run,
}


def with_table(page: str, name: str, content: str) -> str:
    begin, end = f"<!-- begin generated: {name} -->\n", f"<!-- end generated: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"the page must hold the markers of the table {name!r} exactly once")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", page)


def main() -> int:
    stale = []
    for (file, name), make in TABLES.items():
        path = DOCS / file
        page = path.read_text()
        fresh = with_table(page, name, make())
        if fresh != page:
            stale.append(f"{file} ({name})")
            if "--check" not in sys.argv:
                path.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"stale tables: {', '.join(stale)}; run python scripts/doc_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
