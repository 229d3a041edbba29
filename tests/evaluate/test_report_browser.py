"""The page in a real browser, at the width of a laptop and of a phone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from openvsa.evaluate.comparison import Comparison
from openvsa.evaluate.recorder import AttentionRecord
from openvsa.evaluate.report import write_report
from openvsa.layout import TileLayout

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = [1280, 390]
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("these tests drive the browser Chromium, which is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and everything it complained about."""

    page: Page
    complaints: list[str]

    def picture(self) -> bytes:
        """The pixels of the drawing, with the pointer out of the way."""
        self.page.mouse.move(0, 0)
        return self.page.locator("#picture").screenshot()

    def text(self, element: str) -> str:
        return self.page.locator(element).inner_text()

    def kept(self) -> list[int]:
        """The tiles that the drawing shows as read."""
        found = self.page.locator('.tile[data-kept="1"]').evaluate_all("all => all.map(e => Number(e.dataset.tile))")
        return sorted(found)


OpenPage = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a report; at the end no page may have written an error to the console, or asked for a file."""
    opened = []

    def open_report(path: Path, width: int, **context: str) -> Opened:
        page = browser.new_page(viewport={"width": width, "height": 900}, **context)
        page.set_default_timeout(PATIENCE_MS)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        opened.append(Opened(page, complaints))
        return opened[-1]

    yield open_report
    for one in opened:
        one.page.close()
        assert one.complaints == []


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(comparison, tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("width", WIDTHS)
def test_both_clips_play_in_step(report: Path, open_page: OpenPage, width: int) -> None:
    page = open_page(report, width, reduced_motion="reduce").page
    times = "[dense.currentTime, sparse.currentTime]"
    page.wait_for_function("dense.readyState >= 2 && sparse.readyState >= 2")
    assert page.evaluate(times) == [0, 0], "nothing moves by itself for a person who asked for less motion"
    page.locator("#play").click()
    page.wait_for_function("dense.currentTime > 0.2 && sparse.currentTime > 0.2")
    assert page.locator("#play").inner_text() == "Pause"
    page.locator("#play").click()
    page.wait_for_function("dense.paused && sparse.paused")
    page.locator("#scrub").fill("18")
    page.wait_for_function("!dense.seeking && !sparse.seeking")
    assert page.evaluate(times) == [pytest.approx(18.5 / 12)] * 2
    assert "Frame 19 of 24: PSNR" in page.locator("#frame-facts").inner_text()


def test_the_clips_start_again_at_their_end(report: Path, open_page: OpenPage) -> None:
    page = open_page(report, 1280).page
    page.wait_for_function("!dense.paused && dense.currentTime > 1.2")
    page.wait_for_function("!dense.paused && dense.currentTime < 1")
    page.wait_for_function("!sparse.paused && Math.abs(dense.currentTime - sparse.currentTime) < 0.2")


def test_the_difference_is_that_of_the_frames(report: Path, open_page: OpenPage, comparison: Comparison) -> None:
    page = open_page(report, 1280, reduced_motion="reduce").page
    page.wait_for_function("dense.readyState >= 2 && sparse.readyState >= 2")
    page.locator("#show-difference").click()
    mean = """() => {
        const canvas = document.getElementById("difference");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.reduce((sum, value, at) => sum + (at % 4 < 3 ? value : 0), 0) / (pixels.length * 0.75);
    }"""
    a, b = comparison.dense_clip[0].int(), comparison.sparse_clip[0].int()
    expected = (4 * (a - b).abs()).clamp(max=255).float().mean().item()
    assert page.evaluate(mean) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("width", WIDTHS)
def test_choosing_a_tile_changes_the_picture(report: Path, open_page: OpenPage, width: int) -> None:
    opened = open_page(report, width, reduced_motion="reduce")
    page, before, kept, name = opened.page, opened.picture(), opened.kept(), opened.text("#tile-name")
    assert opened.text("#kept-count") == str(len(kept))
    page.locator('.tile[data-tile="2"]').click()
    assert opened.picture() != before
    assert opened.kept() != kept
    assert opened.text("#tile-name") != name
    assert opened.text("#kept-count") == str(len(opened.kept()))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_of_the_screen(report: Path, open_page: OpenPage, width: int) -> None:
    page = open_page(report, width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("chooser", ["steps", "layers", "heads"])
def test_step_layer_and_head_change_the_picture(report: Path, open_page: OpenPage, chooser: str) -> None:
    opened = open_page(report, 1280, reduced_motion="reduce")
    seen = {opened.picture()}
    options = opened.page.locator(f"#{chooser} .chip")
    checked = opened.page.locator(f"#{chooser} input:checked").evaluate("e => e.value")
    others = [i for i in range(options.count()) if options.nth(i).locator("input").get_attribute("value") != checked]
    for index in others:
        options.nth(index).click()
        seen.add(opened.picture())
    assert len(seen) == 1 + len(others)


def test_the_page_shows_what_was_recorded(report: Path, open_page: OpenPage, comparison: Comparison) -> None:
    opened = open_page(report, 1280, reduced_motion="reduce")
    page, record = opened.page, comparison.attention
    page.locator("#steps .chip").nth(2).click()
    page.locator("#layers .chip").nth(0).click()
    page.locator("#heads .chip").nth(1).click()
    page.locator('.tile[data-tile="20"]').click()
    call = record.calls[2, 0]
    bits = [j for j in range(record.layout.num_blocks) if call.kept[1, 20, j // 8].item() >> j % 8 & 1]
    assert opened.kept() == bits
    assert opened.text("#kept-count") == str(len(bits))
    assert opened.text("#recall").replace("\N{NO-BREAK SPACE}", " ") == f"{100 * call.recall[1, 20].item() / 255:.0f} %"
    page.locator("#heads .chip").nth(2).click()
    either = [
        j
        for j in range(record.layout.num_blocks)
        if call.kept[:, 20, j // 8].max() and any(call.kept[h, 20, j // 8].item() >> j % 8 & 1 for h in range(2))
    ]
    assert opened.kept() == either


def test_the_keyboard_moves_the_choice(report: Path, open_page: OpenPage) -> None:
    opened = open_page(report, 1280, reduced_motion="reduce")
    page = opened.page
    chosen = "() => Number(document.querySelector('.tile[tabindex=\"0\"]').dataset.tile)"
    # 2 text blocks, then slabs of 3 x 4 tiles, then 1 text block: the middle one is in slab 1, row 1, column 2.
    assert page.evaluate(chosen) == 2 + 12 + 4 + 2
    page.locator('.tile[tabindex="0"]').focus()
    for key, tile in [("ArrowRight", 21), ("ArrowRight", 21), ("ArrowUp", 17), ("ArrowLeft", 16), ("ArrowDown", 20)]:
        page.keyboard.press(key)
        assert page.evaluate(chosen) == tile, key
    for key, tile in [
        ("PageUp", 8),
        ("PageUp", 1),
        ("PageDown", 3),
        ("PageDown", 15),
        ("PageDown", 27),
        ("PageDown", 38),
    ]:
        page.keyboard.press(key)
        assert page.evaluate(chosen) == tile, key
    assert page.evaluate("document.activeElement.dataset.tile") == "38"
    assert "text after the video" in opened.text("#tile-name")
    assert "read" in page.locator("#spoken").text_content()


def test_pointing_shows_another_tile_for_the_moment(report: Path, open_page: OpenPage) -> None:
    opened = open_page(report, 1280, reduced_motion="reduce")
    kept = opened.kept()
    opened.page.locator('.tile[data-tile="2"]').hover()
    assert opened.kept() != kept
    opened.page.mouse.move(0, 0)
    assert opened.kept() == kept


@pytest.mark.parametrize(
    "layout",
    [TileLayout(grid=(1, 1, 1), tile=(4, 4, 4)), TileLayout(grid=(9, 14), tile=(4, 4), prefix=3)],
    ids=["one-token", "image"],
)
def test_other_lattices_do_not_break_the_page(
    layout: TileLayout,
    open_page: OpenPage,
    make_record: Callable[..., AttentionRecord],
    comparison: Comparison,
    make_comparison: Callable[..., Comparison],
    tmp_path: Path,
) -> None:
    other = make_comparison(comparison.dense_clip[:1], comparison.sparse_clip[:1], make_record(layout))
    opened = open_page(write_report(other, tmp_path), 390, reduced_motion="reduce")
    assert opened.page.locator(".tile").count() == layout.num_blocks
    assert opened.text("#kept-count") == str(len(opened.kept()))


def test_a_record_that_lacks_a_layer_offers_the_others(
    open_page: OpenPage,
    make_record: Callable[..., AttentionRecord],
    comparison: Comparison,
    tmp_path: Path,
    make_comparison: Callable[..., Comparison],
) -> None:
    record = make_record(TileLayout(grid=(4, 4, 4), tile=(2, 2, 2)))
    del record.calls[0, 1]
    page = open_page(
        write_report(make_comparison(comparison.dense_clip, comparison.sparse_clip, record), tmp_path), 1280
    ).page
    disabled = "all => all.map(e => e.disabled)"
    assert page.locator("#layers input").evaluate_all(disabled) == [False, False, False]
    page.locator("#steps .chip").nth(0).click()
    assert page.locator("#layers input").evaluate_all(disabled) == [False, True, False]
    assert page.locator("#layers input:checked").evaluate("e => e.value") == "2"


def test_light_and_dark_follow_the_system(report: Path, open_page: OpenPage) -> None:
    colours = [
        open_page(report, 1280, color_scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in colours]
    assert brightness[0] > 600 > 150 > brightness[1]
