"""An audit as files: the numbers as JSON, and one page that holds everything."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from openvsa.errors import require
from openvsa.evaluate.audit_figures import AuditFigures
from openvsa.evaluate.files import atomic_path, check_output_folder
from openvsa.evaluate.picture import picture_data
from openvsa.evaluate.recorder import AttentionRecord

__all__ = ["Heatmap", "heatmaps", "page_of", "render_audit", "write_audit"]


@dataclass(frozen=True)
class Heatmap:
    """A table of shaded cells, None where a layer has no such head or step; shades are in [0, 1], where 1 is the worst
    of the table; in a table of densities, the highest."""

    key: str
    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, float] | None, ...]], ...]


def page_of(out: str | Path) -> Path:
    """The page of an audit that is written to a folder, or to a page of another name, which ends in .html."""
    out = Path(out)
    return out if out.suffix.lower() in (".html", ".htm") and not out.is_dir() else out / "audit.html"


def write_audit(
    figures: AuditFigures, out: str | Path, *, clip: Tensor | None = None, attention: AttentionRecord | None = None
) -> Path:
    """Writes a page and the same numbers as JSON beside it, both or neither; returns the path of the page.

    Args:
        out: a folder, which gets audit.html and audit.json, or the page's own name, which ends in .html.
        clip: the sparse clip, uint8 [frames, height, width, 3], which the picture of the tiles is drawn over.
        attention: what the picture shows; without both there is none.

    Raises:
        OpenVSAError: the folder cannot be written.
    """
    target = page_of(out)
    check_output_folder(target.parent)
    with ExitStack() as together:
        # A stack is left in the opposite order, so the page, entered first, appears last.
        page, numbers = (together.enter_context(atomic_path(path)) for path in (target, target.with_suffix(".json")))
        numbers.write_text(figures.to_json(), encoding="utf-8")
        page.write_text(render_audit(figures, clip, attention), encoding="utf-8")
    return target


def render_audit(figures: AuditFigures, clip: Tensor | None, attention: AttentionRecord | None) -> str:
    """The page as one HTML text with the pictures, the styles and the scripts inside."""
    jinja2 = require("jinja2", extra="video")
    templates = files("openvsa.evaluate") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "figure": _figure}

    def part(name: str) -> str:
        return (templates / name).read_text(encoding="utf-8")

    picture = None
    if attention is not None and clip is not None:
        # Everything else of an audit, and its option --at, counts steps from 0.
        picture = picture_data(attention, clip) | {"firstStep": 0}
    return environment.from_string(part("audit.html")).render(
        figures=figures,
        settings=figures.settings,
        heatmaps=heatmaps(figures),
        config=_described(figures),
        curve=_curve(figures),
        time_curve=_time_curve(figures),
        picture=picture,
        style=part("report.css"),
        picture_script=part("picture.js"),
    )


def _described(figures: AuditFigures) -> str:
    """The settings that are not as by default, in one line."""
    config = figures.settings.config
    values = {} if config is None else config.to_dict()
    return "; ".join(f"{name} {json.dumps(value)}" for name, value in values.items())


def heatmaps(figures: AuditFigures) -> list[Heatmap]:
    """Layer by head, mean over the audited steps, and layer by step, all heads together. What stays dense is called so,
    and is no loss."""
    heads = max(len(call.figures.recall) for call in figures.calls)
    of_heads = tuple(f"head {head}" for head in range(heads))
    of_steps = tuple(f"step {step}" for step in figures.steps)

    left_dense = {(call.layer, call.step): _DENSE for call in figures.dense_calls}

    def by_head(value: Any) -> dict[int, list[float | str | None]]:
        found: dict[int, list[float | str | None]] = {}
        for layer in figures.layers:
            if layer in figures.dense_layers:
                found[layer] = [_DENSE] * heads
                continue
            calls = [value(call) for call in figures.calls if call.layer == layer]
            means = [sum(of_head) / len(calls) for of_head in zip(*calls, strict=True)]
            found[layer] = [*means, *[None] * (heads - len(means))]
        return found

    def by_step(value: Any) -> dict[int, list[float | str | None]]:
        at = left_dense | {(call.layer, call.step): value(call) for call in figures.calls}
        return {layer: [at.get((layer, step)) for step in figures.steps] for layer in figures.layers}

    maps = [
        _heatmap(
            "error-head", "Output error, layer by head",
            "Norm of the error of each head's attention output over the norm of the output.",
            figures, of_heads, by_head(lambda call: call.head_errors), least=0.0, worst_is_high=True,
        ),
        _heatmap(
            "recall-head", "Recall, layer by head",
            "Share of the exact attention of each head that falls on the tiles it reads.",
            figures, of_heads, by_head(lambda call: call.figures.recall), least=1.0, worst_is_high=False,
        ),
        _heatmap(
            "error-step", "Output error, layer by step", "All heads of a layer together.",
            figures, of_steps, by_step(lambda call: call.error), least=0.0, worst_is_high=True,
        ),
        _heatmap(
            "recall-step", "Recall, layer by step", "Mean over the heads of a layer.",
            figures, of_steps, by_step(lambda call: sum(call.figures.recall) / len(call.figures.recall)),
            least=1.0, worst_is_high=False,
        ),
    ]  # fmt: skip
    table = figures.table
    if table:
        padded: dict[int, list[float | str | None]] = {}
        for layer, name in figures.layers.items():
            shares = table.layers.get(name, ())
            padded[layer] = [*shares, *[None] * (heads - len(shares))]
        maps.append(
            _heatmap(
                "budget-head",
                "The budget table, layer by head",
                "The density of each head: the stronger the colour, the more it reads. The mean of all of them is the "
                "density asked for, in whole tiles.",
                figures,
                of_heads,
                padded,
                least=0.0,
                worst_is_high=True,
            )
        )
    return maps


def _heatmap(
    key: str,
    title: str,
    about: str,
    figures: AuditFigures,
    columns: tuple[str, ...],
    values: dict[int, list[float | str | None]],
    *,
    least: float,
    worst_is_high: bool,
) -> Heatmap:
    found = [value for row in values.values() for value in row if not isinstance(value, str | None)]
    worst = max(found) if worst_is_high else min(found)
    span = abs(worst - least) or 1.0

    def cell(value: float | str | None) -> tuple[str, float] | None:
        if value is None or isinstance(value, str):
            return None if value is None else (value, 0.0)
        return _percent(value), min(1.0, abs(value - least) / span)

    rows = tuple((f"{layer} {name}", tuple(map(cell, values[layer]))) for layer, name in figures.layers.items())
    return Heatmap(key, title, about, columns, rows)


_DENSE = "dense"
_WIDTH, _HEIGHT = 600.0, 220.0


def _curve(figures: AuditFigures) -> dict[str, Any]:
    """The line of error against density, in the coordinates of an SVG of _WIDTH by _HEIGHT."""
    points = figures.curve()
    top = max((error for _, error in points), default=1.0) or 1.0
    return _drawn([(density, error / top) for density, error in points], figures.settings.density, _percent(top))


def _time_curve(figures: AuditFigures) -> dict[str, Any]:
    """The line of attention seconds against density, with the seconds of dense attention and where the two meet."""
    top = max(figures.dense_forward, *(at.seconds for at in figures.times)) or 1.0
    points = [(at.density, at.seconds / top) for at in figures.times]
    drawn = _drawn(points, figures.settings.density, f"{_figure(top)} s", figures.dense_forward / top)
    if figures.break_even is not None and max(at.seconds for at in figures.times) >= figures.dense_forward:
        drawn["meet"] = round(_WIDTH * figures.break_even, 1)
    return drawn


def _drawn(
    points: list[tuple[float, float]], density: float | None, top: str, level: float | None = None
) -> dict[str, Any]:
    place = [(round(_WIDTH * x, 1), round(_HEIGHT * (1 - y), 1)) for x, y in points]
    return {
        "points": place,
        "line": " ".join(f"{x},{y}" for x, y in place),
        "density": None if density is None else round(_WIDTH * density, 1),
        "top": top,
        "level": None if level is None else round(_HEIGHT * (1 - level), 1),
        "meet": None,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == float("inf"):
        return "∞"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
