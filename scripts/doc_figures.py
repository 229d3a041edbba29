"""Draw the figures of the documentation with the real code and data, so that a picture cannot say something else.

python scripts/doc_figures.py            # write docs/assets/*.svg
python scripts/doc_figures.py --check    # fail if a file on disk differs
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch

from openvsa import BlockPlan, TileLayout

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs" / "assets"
CURVE = ROOT / "benchmarks" / "results" / "training-curve.jsonl"
COLOURS = ["#7aa6da", "#f2a65a", "#8cc084", "#c38fd1", "#e5c95d", "#e07a7a"]
INK, PAPER, EMPTY = "#1f2933", "#ffffff", "#eef1f4"


def svg(width: float, height: float, parts: list[str], title: str) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">\n<title>{title}</title>\n'
    )
    return head + f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"


def box(x: float, y: float, w: float, h: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{PAPER}" stroke-width="1.5"/>'


def text(x: float, y: float, words: object, *, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{words}</text>'


def tiles() -> str:
    """A 2-D lattice cut into tiles, and the same tokens as blocks of one sequence."""
    layout = TileLayout(grid=(4, 7), tile=(2, 3))
    rows, columns = layout.grid
    position = layout.permutation.argsort().view(rows, columns)
    block = torch.bucketize(position, layout.block_offsets.long(), right=True) - 1
    cell, left, top = 30, 20, 34
    parts = [
        text(left, 20, "tokens of a (4, 7) lattice, tile (2, 3): numbers are positions in block order", anchor="start")
    ]
    for i in range(rows):
        for j in range(columns):
            x, y = left + j * cell, top + i * cell
            parts.append(box(x, y, cell, cell, COLOURS[int(block[i, j]) % len(COLOURS)]))
            parts.append(text(x + cell / 2, y + cell / 2 + 4, int(position[i, j])))
    offsets = layout.block_offsets.tolist()
    unit, y = 18, top + rows * cell + 34
    parts.append(
        text(left, y - 10, "the same tokens as one sequence: six blocks, the border ones short", anchor="start")
    )
    for i, (start, stop) in enumerate(pairwise(offsets)):
        parts.append(box(left + start * unit, y, (stop - start) * unit, cell, COLOURS[i % len(COLOURS)]))
        parts.append(text(left + (start + stop) / 2 * unit, y + cell / 2 + 4, f"{stop - start}"))
    parts += [text(left + offset * unit, y + cell + 16, offset) for offset in offsets]
    parts.append(text(left + offsets[-1] * unit + 14, y + cell + 16, "block_offsets", anchor="start"))
    return svg(640, y + cell + 30, parts, "A lattice of tokens, its tiles and its blocks")


def plan() -> str:
    """A block plan as a mask over ragged blocks and as the index lists that kernels read."""
    layout = TileLayout(grid=(4, 7), tile=(2, 3))
    offsets = layout.block_offsets
    kept = [[0, 1], [0, 1, 2], [2], [0, 3], [3, 4], [2, 4, 5]]
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    for row, columns in enumerate(kept):
        mask[..., row, columns] = True
    the_plan = BlockPlan.from_block_mask(mask, offsets, offsets)
    counts, indices = the_plan.kv_num_blocks[0, 0].tolist(), the_plan.kv_indices[0, 0].tolist()
    unit, left, top = 7.5, 90, 50
    parts = [text(left, 20, "block_mask: which key blocks each query block reads", anchor="start")]
    edges = offsets.tolist()
    side = edges[-1] * unit
    for i in range(6):
        for j in range(6):
            x, y = left + edges[j] * unit, top + edges[i] * unit
            w, h = (edges[j + 1] - edges[j]) * unit, (edges[i + 1] - edges[i]) * unit
            parts.append(box(x, y, w, h, COLOURS[0] if mask[0, 0, i, j] else EMPTY))
        middle = (edges[i] + edges[i + 1]) / 2 * unit
        parts.append(text(left - 8, top + middle + 4, f"q_block {i}", anchor="end"))
        parts.append(text(left + middle, top - 8, i))
        parts.append(text(left + side + 80, top + middle + 4, counts[i]))
        row = ", ".join(map(str, indices[i][: counts[i]]))
        parts.append(text(left + side + 190, top + middle + 4, row))
    parts.append(text(left + side + 80, top - 8, "kv_num_blocks", bold=True))
    parts.append(text(left + side + 190, top - 8, "kv_indices", bold=True))
    note = f"density {float(the_plan.density):.2f}: the share of blocks that is computed"
    parts.append(text(left, top + side + 24, note, anchor="start"))
    return svg(640, top + side + 36, parts, "A block plan as a mask and as index lists")


def branches() -> str:
    """The two branches of video sparse attention."""
    parts = []

    def node(x: float, y: float, words: str, colour: str, width: float = 140) -> None:
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="34" rx="6" fill="{colour}"/>')
        parts.append(text(x + width / 2, y + 21, words))

    def arrow(*points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>')

    parts.append(
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    node(20, 80, "q, k, v: tokens", EMPTY)
    node(20, 20, "mean per tile", COLOURS[0])
    node(190, 20, "scores of tiles", COLOURS[0])
    node(360, 20, "softmax, times v", COLOURS[0])
    node(530, 20, "× branch_weight", COLOURS[0])
    node(190, 80, "Selector → plan", COLOURS[1])
    node(360, 80, "exact, kept tiles", COLOURS[2])
    node(530, 80, "sum: the output", EMPTY)
    arrow((90, 80), (90, 54))
    arrow((160, 37), (190, 37))
    arrow((330, 37), (360, 37))
    arrow((500, 37), (530, 37))
    arrow((260, 54), (260, 80))
    arrow((330, 97), (360, 97))
    arrow((90, 114), (90, 134), (430, 134), (430, 114))
    arrow((500, 97), (530, 97))
    arrow((600, 54), (600, 80))
    parts.append(
        text(
            20,
            165,
            "blue: compressed branch; orange: the choice, without a gradient; green: sparse branch",
            anchor="start",
        )
    )
    return svg(690, 180, parts, "The compressed and the sparse branch")


def loss_curve() -> str:
    """The loss on held-out shots during the training of the bundled model, for each density it was evaluated at."""
    lines = [json.loads(line) for line in CURVE.read_text().splitlines()]
    lines = [line for line in lines if "held_out" in line]
    curves = {
        f"{name} shots, density {density}": [(line["step"], line[key][density]) for line in lines]
        for key, name in (("held_out", "held-out"), ("training", "training"))
        for density in lines[0][key]
    }
    last_step = lines[-1]["step"]
    values = [value for curve in curves.values() for _, value in curve]
    low, high = min(values), max(values)
    left, top, width, height = 60, 20, 560, 260

    def place(step: int, value: float) -> str:
        return f"{left + width * step / last_step:.1f},{top + height * (high - value) / (high - low):.1f}"

    parts = [f'<path d="M{left},{top} V{top + height} H{left + width}" fill="none" stroke="{INK}"/>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(text(left + width * share, top + height + 18, f"{last_step * share:,.0f}"))
        parts.append(text(left - 8, top + height * (1 - share) + 4, f"{low + (high - low) * share:.3f}", anchor="end"))
    parts.append(text(left + width / 2, top + height + 38, "training steps"))
    for i, (name, curve) in enumerate(curves.items()):
        points, dashes = (
            " ".join(place(*point) for point in curve),
            "" if "held-out" in name else ' stroke-dasharray="4 3"',
        )
        colour, y = COLOURS[i % len(COLOURS)], top + 12 + 20 * i
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(f'<path d="M{left + 300},{y} h30" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(text(left + 340, y + 4, name, anchor="start"))
    return svg(640, top + height + 50, parts, "Loss on held-out shots against training steps")


FIGURES = {"tiles.svg": tiles, "plan.svg": plan, "branches.svg": branches, "loss-curve.svg": loss_curve}


def main() -> int:
    stale = []
    for name, draw in FIGURES.items():
        path, picture = ASSETS / name, draw()
        if not path.exists() or path.read_text() != picture:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(picture)
    if stale and "--check" in sys.argv:
        print(f"stale figures: {', '.join(stale)}; run python scripts/doc_figures.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
