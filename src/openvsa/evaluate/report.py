"""A comparison as files: three videos, the figures as JSON, and one page that holds everything."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path

from openvsa.errors import require
from openvsa.evaluate.comparison import Comparison, finite_or_none
from openvsa.evaluate.files import atomic_path, check_output_folder
from openvsa.evaluate.picture import data_url, picture_data
from openvsa.evaluate.video import side_by_side, write_video
from openvsa.layout import TileLayout

__all__ = ["FILES", "render_page", "write_report"]

FILES = ("report.html", "report.json", "dense.mp4", "sparse.mp4", "side_by_side.mp4")


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Writes dense.mp4, sparse.mp4, side_by_side.mp4, report.json and report.html; returns the path of the page.

    All files appear together at the end, the page last; when anything fails, or on Ctrl-C, none of them does.

    Raises:
        OpenVSAError: the folder cannot be written.
    """
    folder = check_output_folder(folder)
    fps = comparison.figures.settings.fps
    labels = ("full attention", f"sparse attention, density {comparison.figures.density:.3g}")
    with ExitStack() as together:

        def place(name: str) -> Path:
            return together.enter_context(atomic_path(folder / name))

        # A stack is left in the opposite order, so the page, entered first, appears last.
        page, figures, dense, sparse, both = map(place, FILES)
        write_video(comparison.dense_clip, dense, fps=fps)
        write_video(comparison.sparse_clip, sparse, fps=fps)
        write_video(side_by_side(comparison.dense_clip, comparison.sparse_clip, labels), both, fps=fps)
        figures.write_text(comparison.figures.to_json(), encoding="utf-8")
        page.write_text(render_page(comparison, dense.read_bytes(), sparse.read_bytes()), encoding="utf-8")
    return folder / "report.html"


def render_page(comparison: Comparison, dense_mp4: bytes, sparse_mp4: bytes) -> str:
    """The page as one HTML text with the videos, the pictures, the styles and the scripts inside."""
    jinja2 = require("jinja2", extra="video")
    templates = files("openvsa.evaluate") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": _figure,
        "seconds": lambda value: f"{_figure(value)}\N{NO-BREAK SPACE}s",
        "percent": lambda share: f"{100 * share:.3g}\N{NO-BREAK SPACE}%",
    }

    def part(name: str) -> str:
        return (templates / name).read_text(encoding="utf-8")

    figures, record = comparison.figures, comparison.attention
    return environment.from_string(part("report.html")).render(
        figures=figures,
        settings=figures.settings,
        sparsity=json.dumps(figures.settings.sparsity),
        longest=max(figures.dense.total_seconds, figures.sparse.total_seconds),
        recall={layer: record.mean_recall(layer) for layer in record.layers} if record else {},
        dense_video=data_url(dense_mp4, "video/mp4"),
        sparse_video=data_url(sparse_mp4, "video/mp4"),
        clip=_clip_data(comparison),
        picture=picture_data(record, comparison.sparse_clip) if record else None,
        picture_layout=_describe(record.layout) if record else None,
        style=part("report.css"),
        player_script=part("player.js"),
        picture_script=part("picture.js"),
    )


def _clip_data(comparison: Comparison) -> dict[str, object]:
    """What the player needs, as JSON types."""
    figures = comparison.figures
    frames, height, width, _ = comparison.dense_clip.shape
    return {
        "frames": frames,
        "width": width,
        "height": height,
        "fps": figures.settings.fps,
        "psnr": [finite_or_none(value) for value in figures.quality.psnr],
        "ssim": list(figures.quality.ssim),
        "vif": list(figures.quality.vif),
    }


def _describe(layout: TileLayout) -> str:
    tile, grid = (" × ".join(map(str, sides)) for sides in (layout.tile, layout.grid))
    return f"{layout.num_tiles} of up to {tile} tokens, in a lattice of {grid}"


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == float("inf"):
        return "∞"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
