"""The figures and the files of a report."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openvsa.errors import OpenVSAError
from openvsa.evaluate import report
from openvsa.evaluate.comparison import Comparison, Figures
from openvsa.evaluate.picture import panels
from openvsa.evaluate.quality import Quality
from openvsa.evaluate.report import write_report
from openvsa.evaluate.video import read_video
from openvsa.layout import TileLayout

NAMES = ["dense.mp4", "report.html", "report.json", "side_by_side.mp4", "sparse.mp4"]


def embedded(page: str, name: str) -> Any:
    """The JSON block of the page with that id."""
    start = page.index(f'id="{name}">') + len(f'id="{name}">')
    return json.loads(page[start : page.index("</script>", start)])


def test_figures_survive_json(comparison: Comparison) -> None:
    figures = comparison.figures
    assert Figures.from_json(figures.to_json()) == figures
    identical = replace(figures, quality=Quality((math.inf, 30.0), (1.0, 0.5)))
    text = identical.to_json()
    assert "Infinity" not in text
    assert Figures.from_json(text) == identical


def test_derived_figures_by_hand(comparison: Comparison) -> None:
    figures = comparison.figures
    assert figures.speedup == pytest.approx(40 / 22)
    assert figures.attention_speedup == pytest.approx(24 / 6.5)
    assert figures.dense.rest_seconds == 16.0
    assert figures.density == 0.25
    assert figures.layers[1].speedup == pytest.approx(4 / 1.2)
    assert json.loads(figures.to_json())["derived"]["speedup"] == pytest.approx(40 / 22)


def test_a_report_is_five_files_and_the_page_holds_them(tmp_path: Path, comparison: Comparison) -> None:
    page_path = write_report(comparison, tmp_path / "out")
    assert page_path == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in page_path.parent.iterdir()) == NAMES
    assert Figures.from_json((tmp_path / "out/report.json").read_text()) == comparison.figures
    for name, clip in (("dense", comparison.dense_clip), ("sparse", comparison.sparse_clip)):
        assert read_video(tmp_path / f"out/{name}.mp4").shape == clip.shape
    page = page_path.read_text()
    for name in ("dense", "sparse"):
        assert base64.b64encode((tmp_path / f"out/{name}.mp4").read_bytes()).decode() in page
    assert page_path.stat().st_size < 8 << 20
    picture = embedded(page, "picture-data")
    assert len(picture["calls"]) == 9
    assert len(base64.b64decode(picture["calls"][0]["probability"])) == 2 * picture["numBlocks"] ** 2


def test_the_page_needs_no_network_and_escapes_what_it_shows(tmp_path: Path, comparison: Comparison) -> None:
    page = write_report(comparison, tmp_path).read_text()
    assert "Made of sines &lt;/script&gt; &amp; cosines." in page
    for link in ('src="http', 'href="http', "url(http", "@import", "fetch(", "XMLHttpRequest"):
        assert link not in page


def test_a_report_without_a_record_has_no_picture(tmp_path: Path, comparison: Comparison) -> None:
    page = write_report(replace(comparison, attention=None), tmp_path).read_text()
    assert "picture-data" not in page
    assert 'id="layer-table"' in page


def test_ctrl_c_while_writing_leaves_the_old_report(
    tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(comparison, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render_page", stop)
    changed = replace(comparison, dense_clip=255 - comparison.dense_clip)
    with pytest.raises(KeyboardInterrupt):
        write_report(changed, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unwritable_folder_is_reported(comparison: Comparison) -> None:
    with pytest.raises(OpenVSAError, match="cannot write to the output folder"):
        write_report(comparison, "/proc/nowhere")


LAYOUTS = {
    "ragged": TileLayout(grid=(7, 9, 14), tile=(3, 4, 4), prefix=60, suffix=5),
    "one-token": TileLayout(grid=(1, 1, 1), tile=(4, 4, 4)),
    "image": TileLayout(grid=(9, 14), tile=(4, 4), prefix=3),
    "text": TileLayout(grid=(40,), tile=(16,)),
    "one-slab": TileLayout(grid=(4, 18, 32), tile=(4, 2, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_panels_hold_every_block_once(layout: TileLayout, make_clip: Callable[..., torch.Tensor]) -> None:
    drawn = panels(layout, make_clip(10, 36, 48))
    blocks = []
    for panel in drawn:
        rows, cols = len(panel["ys"]) - 1, len(panel["xs"]) - 1
        blocks += range(panel["first"], panel["first"] + rows * cols)
        for edges in (panel["xs"], panel["ys"]):
            assert edges[0] == 0.0
            assert edges[-1] == 1.0
            assert edges == sorted(edges)
    assert blocks == list(range(layout.num_blocks))


def test_panels_name_their_frames(make_clip: Callable[..., torch.Tensor]) -> None:
    drawn = panels(LAYOUTS["ragged"], make_clip(24, 36, 48))
    assert [panel["label"] for panel in drawn] == [
        "text before the video",
        "frames 1 to 10",
        "frames 11 to 21",
        "frames 21 to 24",
        "text after the video",
    ]
    assert drawn[1]["ys"] == pytest.approx([0, 4 / 9, 8 / 9, 1])


def test_a_denser_video_than_lattice_rows_shows_single_frames(make_clip: Callable[..., torch.Tensor]) -> None:
    drawn = panels(TileLayout(grid=(8, 4, 4), tile=(2, 4, 4)), make_clip(4, 16, 16))
    assert [panel["label"] for panel in drawn] == ["frame 1", "frame 2", "frame 3", "frame 4"]
